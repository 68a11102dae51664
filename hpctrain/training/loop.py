"""The training run, from top to bottom: resume, step, log, evaluate, checkpoint, stop."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from hpctrain.config import Config
from hpctrain.data.reader import ShardReader
from hpctrain.parallel.world import World, end_with_mistake
from hpctrain.training import session
from hpctrain.training.agreement import check_agreement
from hpctrain.training.bad_steps import BadSteps, GuardedStep, bad_step_error
from hpctrain.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    arrays_to_variables,
    variables_to_arrays,
)
from hpctrain.training.dataset import DataSet, skipped_records
from hpctrain.training.lock import RunLock
from hpctrain.training.resume import check_identity, find_checkpoint, has_evaluation, newest_checkpoint, run_identity
from hpctrain.training.run_dir import MetricsLog, last_losses, new_run_dir, prepare_run_dir
from hpctrain.training.step import StepResult, model_state
from hpctrain.training.stop import EXIT_PREEMPTED, StopRequest, job_end_time
from hpctrain.training.timing import SlowHosts, StepTimes, TimedReducer
from hpctrain.training.watch import check_same_weights, summarize
from hpctrain.training.watchdog import (
    EVALUATE,
    SAVE,
    TimedBatches,
    TimedConsole,
    Watchdog,
    Watched,
    give_horovod_time,
)

_SKIPPED_SHOWN = 20  # damaged records named at the end of a run; metrics.jsonl has all


def train(config: Config, world: World, data: DataSet, run_dir: Path | None = None, resume: str = "auto") -> int:
    """Train on this rank together with all others; return the exit code, 0 or EXIT_PREEMPTED.

    `resume` is `auto` (the run directory's newest good checkpoint, if any), `none`, or the path of a checkpoint or
    of another run directory. Raises UserError on every rank for what the user can mend.
    """
    with contextlib.ExitStack() as cleanup:
        return _Run(config, world, data, run_dir, resume, cleanup).train()


class _Run:
    """One rank's part of a run. All ranks call its methods in the same order; only rank 0 writes and prints."""

    def __init__(
        self,
        config: Config,
        world: World,
        data: DataSet,
        run_dir: Path | None,
        resume: str,
        cleanup: contextlib.ExitStack,
    ) -> None:
        """Build everything, take the run directory, and put the newest checkpoint into the variables of all ranks."""
        check_agreement(world, config)
        micro_batches = config.micro_batches_a_rank(world.size)
        give_horovod_time(config.train.stall_seconds)
        self.config, self.world, self.data = config, world, data
        self.console = TimedConsole(world.is_root)
        self.stop = StopRequest(job_end_time(), config.checkpoint.stop_margin_seconds)
        cleanup.callback(self.stop.close)
        session.configure_tensorflow(config, world)
        self.schedule = session.build_schedule(config, data.num_records)
        self.total_steps = session.total_steps(config, data.num_records)
        self.last_step = min(self.total_steps, config.train.steps or self.total_steps)

        self.model = session.build_model(config, data.num_classes)
        self.optimizer = session.build_optimizer(config)
        self.reducer = TimedReducer(
            world,
            bucket_bytes=config.train.bucket_mb * 1e6,
            compression=config.train.compression,
            deterministic=config.train.deterministic,
        )
        self.train_step = GuardedStep(
            self.model,
            self.optimizer,
            self.reducer,
            micro_batches=micro_batches,
            label_smoothing=config.train.label_smoothing,
            seed=config.train.seed,
            deterministic=config.train.deterministic,
        )
        threads = world.plan.threads
        self.evaluator = session.build_evaluator(config, self.model, data.val, world, threads) if data.val else None
        self.model_variables = [*self.model.trainable_variables, *model_state(self.model)]
        self.variables = [*self.model_variables, *self.optimizer.variables]

        self.identity = run_identity(config, data.num_records, data.num_classes, data.classes_checksum)
        self.path, self.done, losses = world.from_root(lambda: self._open(run_dir, resume, cleanup))
        self.bad_steps = BadSteps(config.train.loss_spike, losses)
        self.evaluation_seconds = 0.0  # what the last one took
        self.watch = Watchdog(world, self.path / "stacks", config.train.stall_seconds)
        cleanup.callback(self.watch.close)
        if self.evaluator:
            self.evaluator.reader = cast(ShardReader, Watched(self.evaluator.reader, self.watch.sign))
        self.watch.keep_alive_line(self.console)
        self.reducer.broadcast([variable.value for variable in self.variables])
        tensorboard = config.log.tensorboard
        self.log = MetricsLog(self.path, from_step=self.done, tensorboard=tensorboard) if world.is_root else None
        self.writer = CheckpointWriter(self.path / "checkpoints", config.checkpoint.keep)

    def train(self) -> int:
        """Go from the last step that is done to the end, or to where somebody asks to stop; return the exit code."""
        self._introduce()
        # An evaluation that was due when the run was stopped is made up for.
        due = self.done > 0 and (
            self.done >= self.last_step or self._every(self.config.evaluate.every_epochs, self.done)
        )
        if due and not self.world.from_root(lambda: has_evaluation(self.path, self.done)):
            self._evaluate(self.done)
        if self.done >= self.last_step:
            self.console.line(f"the run is at step {self.done} already; nothing is left to train")
            return 0

        batches, bad_records = session.training_batches(
            self.config,
            self.data,
            self.world,
            first_step=self.done + 1,
            last_step=self.last_step,
            threads=self.world.plan.threads,
        )
        if self.log and self.done:
            self.log.write("resume", self.done, {"epoch": self._epoch_of(self.done)})
        self.console.start_progress(self.last_step, self.done)
        started = time.perf_counter()
        step, wrong = self._take_steps(batches)

        self.watch.ending()
        self.console.stop_progress()
        if wrong and step - 1 > self.done:
            self._save(step - 1, must=True)  # the bad step has changed nothing
        self.writer.wait()
        seconds = time.perf_counter() - started
        skipped = skipped_records(self.data.train, bad_records, self.world)
        skipped += skipped_records(self.data.val, self.evaluator.bad_records if self.evaluator else set(), self.world)
        if self.log:
            reason = "bad step" if wrong else "finished" if step == self.last_step else "preempted"
            end = {"epoch": self._epoch_of(step), "reason": reason, "train_seconds": seconds}
            end |= {"skipped_records": skipped, "skipped_updates": self.bad_steps.count}
            self.log.write("end", step, end)
            self.log.close()
        if wrong:
            newest = self.world.from_root(lambda: newest_checkpoint(self.path))
            raise bad_step_error(step, wrong, self.train_step, self.world, newest)
        return self._conclude(step, seconds, skipped)

    def _take_steps(self, batches: Iterator[Any]) -> tuple[int, str]:
        """Take steps; return the last one, and what is wrong with it where the run must not go on after it."""
        step = self.done
        timed = TimedBatches(batches, lambda place: self.watch.at(place, step))
        times, slow_hosts = StepTimes(self.world), SlowHosts()
        checkpoint, settings = self.config.checkpoint, self.config.train
        stopped = False
        while step < self.last_step and not stopped:
            step += 1
            rate = self.schedule(step)
            show = step % self.config.log.every_steps == 0 or step == self.last_step
            self.train_step.norms.want(show)
            self.train_step.set_limit(self.bad_steps.limit)
            timed.seconds = 0.0
            started = time.perf_counter()
            result = self.train_step(step, timed, rate, self.stop.requested)
            step_seconds = time.perf_counter() - started
            stopped = result.stop
            if step > self.done + 1:  # the first one builds its graph
                self.stop.step_seconds = step_seconds
            self.writer.check()
            times.add(step_seconds, timed.seconds, self.reducer.reduce_seconds)
            timing = times.collect() if show or stopped or times.full else None
            for warning in slow_hosts.find(timing) if timing else ():
                self.console.line(f"warning: {warning}")
            self._record(step, rate, result, step_seconds, timed.seconds, timing, show)

            wrong = self.bad_steps.add(result)
            if wrong:
                if settings.on_bad_step == "stop" or self.bad_steps.too_many:
                    return step, wrong
                self.console.line(f"warning: the update of step {step} is left out: {wrong}")
            evaluate = self.evaluator is not None and self._every(self.config.evaluate.every_epochs, step)
            if evaluate and not stopped and step < self.last_step:
                # It would be made up for when the run goes on.
                stopped = self.world.from_root(lambda: self.stop.leaves_no_time_for(self.evaluation_seconds))
            at_end = step == self.last_step or stopped
            if at_end:
                self.watch.ending()
            if at_end or (step % checkpoint.every_steps == 0 if checkpoint.every_steps else self._every(1.0, step)):
                self._save(step, must=at_end)
            elif settings.check_weights_every and step % settings.check_weights_every == 0:
                check_same_weights(step, self.variables, self.world)
            if step == self.last_step or (evaluate and not stopped):
                self._evaluate(step)
        return step, ""

    def _open(
        self, run_dir: Path | None, resume: str, cleanup: contextlib.ExitStack
    ) -> tuple[Path, int, list[float | None]]:
        """On rank 0: take the run directory and load its newest checkpoint; return path, last step, last losses."""
        path = run_dir or new_run_dir(self.config.name)
        lock = RunLock(path)
        lock.acquire(self.console.line, lambda reason: end_with_mistake(f"{reason}; this job ends"))
        cleanup.callback(lock.release)
        checkpoint, complaints = find_checkpoint(path, resume)
        for complaint in complaints:
            self.console.line(f"warning: {complaint}; going back to an earlier checkpoint")
        if checkpoint is not None:
            check_identity(checkpoint.run, self.identity)
            arrays_to_variables(checkpoint.model, self.model_variables, "model")
            arrays_to_variables(checkpoint.optimizer, self.optimizer.variables, "optimizer")
        data = self.data
        facts = {"num_records": data.num_records, "num_classes": data.num_classes}
        facts["parameters"] = self.model.count_params()
        prepare_run_dir(path, self.config, self.world, facts)  # last: a refused resume leaves the run as it was
        step = checkpoint.step if checkpoint else 0
        return path, step, last_losses(path, step)

    def _evaluate(self, step: int) -> None:
        if self.evaluator is None:
            return
        self.watch.at(EVALUATE, step)
        started = time.perf_counter()
        result = self.evaluator()
        seconds = self.evaluation_seconds = time.perf_counter() - started
        epoch = self._epoch_of(step)
        values = {
            "epoch": epoch,
            "loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "num_images": result.num_images,
            "seconds": seconds,
        }
        if self.log:
            self.log.write("eval", step, values, tensorboard=True)
        self.console.line(
            f"eval  step {step}  epoch {epoch:.2f}  loss {result.loss:.4f}  top-1 {result.top1:.2%}  "
            f"top-5 {result.top5:.2%}  ({result.num_images} images in {seconds:.1f} s)"
        )

    def _save(self, step: int, must: bool) -> None:
        """Begin to write a checkpoint, once all ranks are known to have the same weights."""
        check_same_weights(step, self.variables, self.world)
        if self.log is None:
            return
        self.watch.at(SAVE, step)
        self.log.flush()
        if self.writer.busy and not must:
            # Waiting here would keep all ranks waiting in the next allreduce, in the end for too long.
            self.console.line(f"warning: no checkpoint at step {step}: the one before is still being written")
            return
        arrays = variables_to_arrays(self.model_variables), variables_to_arrays(self.optimizer.variables)
        self.writer.save(Checkpoint(step, *arrays, self.identity))

    def _record(
        self,
        step: int,
        rate: float,
        result: StepResult,
        step_seconds: float,
        input_seconds: float,
        timing: Mapping[str, Any] | None,
        show: bool,
    ) -> None:
        """Write a step into metrics.jsonl, and print it if it is to be shown."""
        if self.log is None:
            return
        epoch, images_per_second = self._epoch_of(step), self.config.train.global_batch / step_seconds
        values: dict[str, Any] = {
            "epoch": epoch,
            "loss": result.loss,
            "top1": result.top1,
            "learning_rate": rate,
            "images_per_second": images_per_second,
            "step_seconds": step_seconds,
            "input_seconds": input_seconds,
        }
        if timing:
            values["timing"] = timing
        if show:
            values["watch"] = summarize(self.train_step.norms.norms(), self.train_step.weights, self.optimizer)
        self.log.write("train", step, values, tensorboard=show)
        self.console.progress(step, f"loss {result.loss:.4f}  {images_per_second:.1f} images/s")
        if show:
            self.console.line(
                f"step {step}/{self.last_step}  epoch {epoch:.2f}  loss {result.loss:.4f}  top-1 {result.top1:.2%}  "
                f"rate {rate:.4g}  {images_per_second:.1f} images/s"
            )

    def _introduce(self) -> None:
        """Print what is about to be trained."""
        config, world, data = self.config, self.world, self.data
        ranks, micro_batches = _count(world.size, "rank"), self.train_step.micro_batches
        self.console.line(
            f"{config.name}: {config.model.name}, {self.model.count_params():,} parameters, "
            f"{data.num_records:,} images, {data.num_classes} classes"
        )
        self.console.line(
            f"{ranks} on {_count(len({place.host for place in world.places}), 'host')}, "
            f"{_count(world.plan.threads, 'thread')} each; global batch {config.train.global_batch} = {ranks} x "
            f"{_count(micro_batches, 'micro-batch', 'es')} x {config.train.micro_batch} images"
        )
        of = f" of {self.total_steps}" if self.total_steps != self.last_step else ""
        self.console.line(f"steps {self.done + 1} to {self.last_step}{of}; run directory {self.path}")

    def _conclude(self, step: int, seconds: float, skipped: list[str]) -> int:
        """Print how the run ended, and return the exit code."""
        why = next((reason for reason in self.world.allgather(self.stop.reason) if reason), "asked to")
        if skipped:
            more = f" and {len(skipped) - _SKIPPED_SHOWN} more" if len(skipped) > _SKIPPED_SHOWN else ""
            named = ", ".join(skipped[:_SKIPPED_SHOWN])
            self.console.line(f"{len(skipped)} damaged records were skipped: {named}{more}")
        if step == self.last_step:
            report = f"`hpctrain report {self.path} --out DIR` draws it"
            self.console.line(f"finished step {step} after {seconds:.1f} s; {report}")
            return 0
        self.console.line(
            f"stopped after step {step} of {self.last_step}: {why}; the checkpoint is complete, the same command with "
            f"--run-dir {self.path} resumes it (exit code {EXIT_PREEMPTED})"
        )
        return EXIT_PREEMPTED

    def _epoch_of(self, step: int) -> float:
        return step * self.config.train.global_batch / self.data.num_records

    def _every(self, epochs: float, step: int) -> bool:
        """Whether a multiple of so many epochs is reached by this step."""
        return int(self._epoch_of(step) / epochs + 1e-9) > int(self._epoch_of(step - 1) / epochs + 1e-9)


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
