"""hpctrain: the trainer's own step through its public parts, alone, under mpirun, or beside others of its kind."""

from collections.abc import Callable

from benchmarks.peers.work import Work, parse_work, time_steps


def make_step(work: Work) -> tuple[Callable[[], None], int]:
    """Return a step as `hpctrain train` takes it, with SGD with momentum, which the others have too; and its FLOP.

    Those are of one image, forward and backward. To be called before TensorFlow is imported.
    """
    from hpctrain.config import load_config
    from hpctrain.parallel.launch import launcher_size
    from hpctrain.parallel.quiet import import_tensorflow
    from hpctrain.parallel.world import start

    config = load_config(
        "demo",
        [
            f"model.name={work.model}",
            f"model.image_size={work.image_size}",
            f"model.num_classes={work.classes}",
            "data.path=null",
            "data.synthetic=true",
            f"train.micro_batch={work.micro_batch}",
            f"train.global_batch={work.micro_batch * launcher_size()}",
            f"train.precision={work.precision}",
            f"train.threads={work.threads}",
            "optimizer.name=sgd",
        ],
    )
    world = start(threads=config.train.threads)
    import_tensorflow()
    from hpctrain.data.synthetic import synthetic_batches
    from hpctrain.models.flops import describe
    from hpctrain.training import session
    from hpctrain.training.bad_steps import GuardedStep
    from hpctrain.training.timing import TimedReducer

    session.configure_tensorflow(config, world)
    model = session.build_model(config, work.classes)
    reducer = TimedReducer(
        world, bucket_bytes=config.train.bucket_mb * 1e6, compression=config.train.compression, deterministic=False
    )
    train_step = GuardedStep(model, session.build_optimizer(config), reducer, micro_batches=1, seed=config.train.seed)
    reducer.broadcast([variable.value for variable in model.variables])
    batches = synthetic_batches(
        micro_batch=work.micro_batch, image_size=work.image_size, num_classes=work.classes, seed=world.rank
    )
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        train_step(count, batches, 1e-6)

    return step, 3 * describe(model)["flops_per_image"]


def main() -> None:
    """Train."""
    work = parse_work()
    step, flops = make_step(work)
    time_steps(work, step, flops_per_image=flops)


if __name__ == "__main__":
    main()
