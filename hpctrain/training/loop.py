"""The training run, from top to bottom: resume, step, log, evaluate, checkpoint, stop."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpctrain.config import Config
from hpctrain.errors import UserError
from hpctrain.parallel.world import World
from hpctrain.training import session
from hpctrain.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    arrays_to_variables,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
    variables_to_arrays,
)
from hpctrain.training.console import Console
from hpctrain.training.dataset import DataSet, skipped_records
from hpctrain.training.run_dir import MetricsLog, new_run_dir, prepare_run_dir, read_metrics
from hpctrain.training.step import TrainStep, model_state
from hpctrain.training.stop import EXIT_PREEMPTED, StopRequest, job_end_time
from hpctrain.training.timing import StepTimes, TimedReducer

_SKIPPED_SHOWN = 20  # damaged records named at the end of a run; metrics.jsonl has all


def train(config: Config, world: World, data: DataSet, run_dir: Path | None = None, resume: str = "auto") -> int:
    """Train on this rank together with all others; return the exit code, 0 or EXIT_PREEMPTED.

    `resume` is `auto` (the run directory's newest good checkpoint, if any), `none`, or the path of a checkpoint or
    of another run directory. Raises UserError on every rank for what the user can mend.
    """
    micro_batches = config.micro_batches_a_rank(world.size)
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
    train_step = TrainStep(
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
    console = Console(world.is_root)
    model_variables = [*model.trainable_variables, *model_state(model)]

    def open_run() -> tuple[Path, int]:
        path = run_dir or new_run_dir(config.name)
        checkpoint, complaints = find_checkpoint(path, resume)
        for complaint in complaints:
            console.line(f"warning: {complaint}; going back to an earlier checkpoint")
        if checkpoint is not None:
            check_identity(checkpoint.run, identity)
            arrays_to_variables(checkpoint.model, model_variables, "model")
            arrays_to_variables(checkpoint.optimizer, optimizer.variables, "optimizer")
        prepare_run_dir(path, config, world, facts)  # last: a refused resume leaves the run as it was
        return path, checkpoint.step if checkpoint else 0

    path, done = world.from_root(open_run)
    reducer.broadcast([variable.value for variable in (*model_variables, *optimizer.variables)])
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

    stop = StopRequest(job_end_time(), config.checkpoint.stop_margin_seconds)
    batches, bad_records = session.training_batches(
        config, data, world, first_step=done + 1, last_step=last_step, threads=threads
    )
    batches = _Timed(batches)
    times = StepTimes(world)
    console.start_progress(last_step, done)
    run_started = time.perf_counter()
    step, stopped = done, False
    while step < last_step and not stopped:
        step += 1
        rate = schedule(step)
        batches.seconds = 0.0
        started = time.perf_counter()
        result = train_step(step, batches, rate, stop.requested)
        step_seconds = time.perf_counter() - started
        stopped = result.stop
        show = step % config.log.every_steps == 0 or step == last_step
        times.add(step_seconds, batches.seconds, reducer.reduce_seconds)
        timing = times.collect() if show or stopped or times.full else None
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
            log.write("train", step, values, tensorboard=show)
            note = f"loss {result.loss:.4f}  {values['images_per_second']:.1f} images/s"
            console.progress(step, note)
            if show:
                console.line(
                    f"step {step}/{last_step}  epoch {epoch_of(step):.2f}  loss {result.loss:.4f}  "
                    f"top-1 {result.top1:.2%}  rate {rate:.4g}  {values['images_per_second']:.1f} images/s"
                )
        at_end = step == last_step or stopped
        every_steps = config.checkpoint.every_steps
        if at_end or (step % every_steps == 0 if every_steps else every(1.0, step)):
            save(step, must=at_end)
        if step == last_step or (every(config.evaluate.every_epochs, step) and not stopped):
            evaluate(step)

    finished = step == last_step
    console.stop_progress()
    writer.wait()
    seconds = time.perf_counter() - run_started
    reason = "finished" if finished else "preempted"
    skipped = skipped_records(data.train, bad_records, world)
    skipped += skipped_records(data.val, evaluator.bad_records if evaluator else set(), world)
    if log:
        end = {"epoch": epoch_of(step), "reason": reason, "train_seconds": seconds, "skipped_records": skipped}
        log.write("end", step, end)
        log.close()
    why = next((r for r in world.allgather(stop.reason) if r), "asked to")
    stop.close()
    if skipped:
        more = f" and {len(skipped) - _SKIPPED_SHOWN} more" if len(skipped) > _SKIPPED_SHOWN else ""
        console.line(f"{len(skipped)} damaged records were skipped: {', '.join(skipped[:_SKIPPED_SHOWN])}{more}")
    if finished:
        console.line(f"finished step {step} after {seconds:.1f} s; `hpctrain report {path} --out DIR` draws it")
        return 0
    console.line(
        f"stopped after step {step} of {last_step}: {why}; the checkpoint is complete, the same command with "
        f"--run-dir {path} resumes it (exit code {EXIT_PREEMPTED})"
    )
    return EXIT_PREEMPTED


def find_checkpoint(run_dir: Path, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint to start from (None for a new run) and complaints about damaged ones passed over."""
    if resume == "none":
        if list_checkpoints(run_dir / "checkpoints"):
            raise UserError(
                f"{run_dir} already holds a run with checkpoints; choose another --run-dir, "
                "or --resume auto to continue"
            )
        return None, []
    if resume == "auto" or list_checkpoints(run_dir / "checkpoints"):
        # Where a run began from another one's checkpoint, its own are what it goes on from once it has any.
        checkpoint, complaints = latest_checkpoint(run_dir / "checkpoints")
        if checkpoint is None and complaints:
            raise UserError(
                f"no checkpoint of {run_dir} can be read: {complaints[0]}; to start anew use another --run-dir"
            )
        return checkpoint, complaints
    return load_checkpoint(Path(resume))


def load_checkpoint(path: Path) -> tuple[Checkpoint, list[str]]:
    """Read a checkpoint folder, or the newest good one of a run directory; return it and complaints about newer ones.

    Raises UserError when there is none.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint or run directory {path}")
    if (path / "state.json").exists():
        return read_checkpoint(path), []
    checkpoint, complaints = latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            complaints[0] if complaints else f"{path} holds no checkpoint; expected a run directory or a step-* folder"
        )
    return checkpoint, complaints


def run_identity(config: Config, num_records: int, num_classes: int) -> dict[str, Any]:
    """What must be the same for a run to go on exactly where a checkpoint left off."""
    return {
        "model.name": config.model.name,
        "model.image_size": config.model.image_size,
        "train.global_batch": config.train.global_batch,
        "train.micro_batch": config.train.micro_batch,
        "train.seed": config.train.seed,
        "train.precision": config.train.precision,
        "optimizer.name": config.optimizer.name,
        "data.partitions": config.data.partitions,
        "data.shuffle_block": config.data.shuffle_block,
        "data.augmentation": config.data.augmentation,
        "number of training records": num_records,
        "model.num_classes": num_classes,
    }


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError when a checkpoint belongs to a run of another kind."""
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"the checkpoint was made with {key} {before.get(key)}, now it is {value}; "
                "set it back, or start a new run in another --run-dir"
            )


def _has_evaluation(run_dir: Path, step: int) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and any(m["kind"] == "eval" and m["step"] == step for m in read_metrics(path))


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


class _Timed:
    """Iterator that adds up the time its consumer waits for it."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        batch = next(self._batches)
        self.seconds += time.perf_counter() - started
        return batch
