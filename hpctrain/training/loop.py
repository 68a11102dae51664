"""The training run, from top to bottom: resume, step, log, evaluate, checkpoint, stop."""

import contextlib
import time
from collections.abc import Callable, Iterator
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
    list_checkpoints,
    variables_to_arrays,
)
from hpctrain.training.dataset import DataSet, skipped_records
from hpctrain.training.lock import RunLock
from hpctrain.training.resume import check_identity, find_checkpoint, run_identity
from hpctrain.training.run_dir import MetricsLog, last_losses, new_run_dir, prepare_run_dir, read_metrics
from hpctrain.training.step import model_state
from hpctrain.training.stop import EXIT_PREEMPTED, StopRequest, job_end_time
from hpctrain.training.timing import SlowHosts, StepTimes, TimedReducer
from hpctrain.training.watch import check_same_weights, summarize
from hpctrain.training.watchdog import (
    EVALUATE,
    INPUT,
    SAVE,
    STEP,
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
        return _train(config, world, data, run_dir, resume, cleanup)


def _train(
    config: Config, world: World, data: DataSet, run_dir: Path | None, resume: str, cleanup: contextlib.ExitStack
) -> int:
    check_agreement(world, config)
    micro_batches = config.micro_batches_a_rank(world.size)
    give_horovod_time(config.train.stall_seconds)
    stop = StopRequest(job_end_time(), config.checkpoint.stop_margin_seconds)
    cleanup.callback(stop.close)
    threads = world.plan.threads
    session.configure_tensorflow(config, threads)
    schedule = session.build_schedule(config, data.num_records)
    total = session.total_steps(config, data.num_records)
    last_step = min(total, config.train.steps or total)

    model = session.build_model(config, data.num_classes)
    optimizer = session.build_optimizer(config)
    reducer = TimedReducer(
        world,
        bucket_bytes=config.train.bucket_mb * 1e6,
        compression=config.train.compression,
        deterministic=config.train.deterministic,
    )
    train_step = GuardedStep(
        model,
        optimizer,
        reducer,
        micro_batches=micro_batches,
        label_smoothing=config.train.label_smoothing,
        seed=config.train.seed,
        deterministic=config.train.deterministic,
    )
    evaluator = session.build_evaluator(config, model, data.val, world, threads) if data.val else None

    # Rank 0 alone touches the run directory.
    facts = {"num_records": data.num_records, "num_classes": data.num_classes, "parameters": model.count_params()}
    identity = run_identity(config, data.num_records, data.num_classes)
    console = TimedConsole(world.is_root)
    model_variables = [*model.trainable_variables, *model_state(model)]
    all_variables = [*model_variables, *optimizer.variables]

    def open_run() -> tuple[Path, int, list[float | None]]:
        path = run_dir or new_run_dir(config.name)
        lock = RunLock(path)
        lock.acquire(console.line, lambda reason: end_with_mistake(f"{reason}; this job ends"))
        cleanup.callback(lock.release)
        checkpoint, complaints = find_checkpoint(path, resume)
        for complaint in complaints:
            console.line(f"warning: {complaint}; going back to an earlier checkpoint")
        if checkpoint is not None:
            check_identity(checkpoint.run, identity)
            arrays_to_variables(checkpoint.model, model_variables, "model")
            arrays_to_variables(checkpoint.optimizer, optimizer.variables, "optimizer")
        prepare_run_dir(path, config, world, facts)  # last: a refused resume leaves the run as it was
        step = checkpoint.step if checkpoint else 0
        return path, step, last_losses(path, step)

    path, done, losses = world.from_root(open_run)
    bad_steps = BadSteps(config.train.loss_spike, losses)
    watch = Watchdog(world, path / "stacks", config.train.stall_seconds)
    cleanup.callback(watch.close)
    if evaluator:
        evaluator.reader = cast(ShardReader, Watched(evaluator.reader, watch.sign))
    watch.keep_alive_line(console)
    reducer.broadcast([variable.value for variable in all_variables])
    log = MetricsLog(path, from_step=done, tensorboard=config.log.tensorboard) if world.is_root else None
    writer = CheckpointWriter(path / "checkpoints", config.checkpoint.keep)

    def epoch_of(step: int) -> float:
        return step * config.train.global_batch / data.num_records

    def every(epochs: float, step: int) -> bool:
        """Whether a multiple of so many epochs is reached by this step."""
        return int(epoch_of(step) / epochs + 1e-9) > int(epoch_of(step - 1) / epochs + 1e-9)

    def evaluate(step: int) -> None:
        if evaluator is None:
            return
        watch.at(EVALUATE, step)
        started = time.perf_counter()
        result = evaluator()
        seconds = time.perf_counter() - started
        values = {
            "epoch": epoch_of(step),
            "loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "num_images": result.num_images,
            "seconds": seconds,
        }
        if log:
            log.write("eval", step, values, tensorboard=True)
        console.line(
            f"eval  step {step}  epoch {epoch_of(step):.2f}  loss {result.loss:.4f}  top-1 {result.top1:.2%}  "
            f"top-5 {result.top5:.2%}  ({result.num_images} images in {seconds:.1f} s)"
        )

    def save(step: int, must: bool) -> None:
        if log is None:
            return
        watch.at(SAVE, step)
        log.flush()
        if writer.busy and not must:
            # Waiting here would keep all ranks waiting in the next allreduce, in the end for too long.
            console.line(f"warning: no checkpoint at step {step}: the one before is still being written")
            return
        arrays = variables_to_arrays(model_variables), variables_to_arrays(optimizer.variables)
        writer.save(Checkpoint(step, *arrays, identity))

    console.line(
        f"{config.name}: {config.model.name}, {model.count_params():,} parameters, {data.num_records:,} images, "
        f"{data.num_classes} classes"
    )
    console.line(
        f"{_count(world.size, 'rank')} on {_count(len({place.host for place in world.places}), 'host')}, "
        f"{_count(threads, 'thread')} each; global batch {config.train.global_batch} = {_count(world.size, 'rank')} x "
        f"{_count(micro_batches, 'micro-batch', 'es')} x {config.train.micro_batch} images"
    )
    console.line(
        f"steps {done + 1} to {last_step}" + (f" of {total}" if total != last_step else "") + f"; run directory {path}"
    )
    # An evaluation that was due when the run was stopped is made up for.
    due = done > 0 and (done >= last_step or every(config.evaluate.every_epochs, done))
    if due and not world.from_root(lambda: _has_evaluation(path, done)):
        evaluate(done)
    if done >= last_step:
        console.line(f"the run is at step {done} already; nothing is left to train")
        return 0

    batches, bad_records = session.training_batches(
        config, data, world, first_step=done + 1, last_step=last_step, threads=threads
    )
    batches = _Timed(batches, lambda place: watch.at(place, step))
    times, slow_hosts = StepTimes(world), SlowHosts()
    console.start_progress(last_step, done)
    run_started = time.perf_counter()
    step, saved, stopped, failed = done, done, False, False
    while step < last_step and not stopped:
        step += 1
        rate = schedule(step)
        batches.seconds = 0.0
        show = step % config.log.every_steps == 0 or step == last_step
        train_step.norms.want(show)
        train_step.set_limit(bad_steps.limit)
        started = time.perf_counter()
        result = train_step(step, batches, rate, stop.requested)
        step_seconds = time.perf_counter() - started
        stopped = result.stop
        writer.check()
        times.add(step_seconds, batches.seconds, reducer.reduce_seconds)
        timing = times.collect() if show or stopped or times.full else None
        for warning in slow_hosts.find(timing) if timing else ():
            console.line(f"warning: {warning}")
        if log:
            values = {
                "epoch": epoch_of(step),
                "loss": result.loss,
                "top1": result.top1,
                "learning_rate": rate,
                "images_per_second": config.train.global_batch / step_seconds,
                "step_seconds": step_seconds,
                "input_seconds": batches.seconds,
            }
            if timing:
                values["timing"] = timing
            if show:
                values["watch"] = summarize(train_step.norms.norms(), train_step.weights, optimizer)
            log.write("train", step, values, tensorboard=show)
            note = f"loss {result.loss:.4f}  {values['images_per_second']:.1f} images/s"
            console.progress(step, note)
            if show:
                console.line(
                    f"step {step}/{last_step}  epoch {epoch_of(step):.2f}  loss {result.loss:.4f}  "
                    f"top-1 {result.top1:.2%}  rate {rate:.4g}  {values['images_per_second']:.1f} images/s"
                )
        wrong = bad_steps.add(result)
        if wrong:
            failed = config.train.on_bad_step == "stop" or bad_steps.too_many
            if failed:
                break
            console.line(f"warning: the update of step {step} is left out: {wrong}")
        at_end = step == last_step or stopped
        if at_end:
            watch.ending()
        every_steps, check_every = config.checkpoint.every_steps, config.train.check_weights_every
        saving = at_end or (step % every_steps == 0 if every_steps else every(1.0, step))
        if saving or (check_every and step % check_every == 0):
            check_same_weights(step, all_variables, world)
        if saving:
            save(step, must=at_end)
            saved = step
        if step == last_step or (every(config.evaluate.every_epochs, step) and not stopped):
            evaluate(step)

    watch.ending()
    console.stop_progress()
    if failed and step - 1 > saved:
        check_same_weights(step - 1, all_variables, world)
        save(step - 1, must=True)  # the bad step has changed nothing
    writer.wait()
    seconds = time.perf_counter() - run_started
    reason = "bad step" if failed else "finished" if step == last_step else "preempted"
    skipped = skipped_records(data.train, bad_records, world)
    skipped += skipped_records(data.val, evaluator.bad_records if evaluator else set(), world)
    if log:
        end = {"epoch": epoch_of(step), "reason": reason, "train_seconds": seconds, "skipped_records": skipped}
        log.write("end", step, end | {"skipped_updates": bad_steps.count})
        log.close()
    if failed:
        raise bad_step_error(step, wrong, train_step, world, world.from_root(lambda: _newest_checkpoint(path)))
    why = next((r for r in world.allgather(stop.reason) if r), "asked to")
    if skipped:
        more = f" and {len(skipped) - _SKIPPED_SHOWN} more" if len(skipped) > _SKIPPED_SHOWN else ""
        console.line(f"{len(skipped)} damaged records were skipped: {', '.join(skipped[:_SKIPPED_SHOWN])}{more}")
    if step == last_step:
        console.line(f"finished step {step} after {seconds:.1f} s; `hpctrain report {path} --out DIR` draws it")
        return 0
    console.line(
        f"stopped after step {step} of {last_step}: {why}; the checkpoint is complete, the same command with "
        f"--run-dir {path} resumes it (exit code {EXIT_PREEMPTED})"
    )
    return EXIT_PREEMPTED


def _newest_checkpoint(run_dir: Path) -> str:
    """The name of the newest checkpoint, empty if there is none."""
    return next((path.name for path in reversed(list_checkpoints(run_dir / "checkpoints"))), "")


def _has_evaluation(run_dir: Path, step: int) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and any(m["kind"] == "eval" and m["step"] == step for m in read_metrics(path))


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


class _Timed:
    """Iterator that adds up the time its consumer waits for it, and tells when the consumer comes and goes."""

    def __init__(self, batches: Iterator[Any], at: Callable[[int], None]) -> None:
        self._batches, self._at = batches, at
        self.seconds = 0.0

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self) -> Any:
        self._at(INPUT)
        started = time.perf_counter()
        batch = next(self._batches)
        self.seconds += time.perf_counter() - started
        self._at(STEP)
        return batch
