"""What the model knows of a machine with a model on it: rates, network, noise, and how sure it is of each."""

from dataclasses import dataclass

from hpctrain.scaling.performance.allreduce import Network

# Parameters that a fit may change, and that the interval of a prediction comes from.
PARAMETERS = ("compute", "alpha", "beta", "straggler_sigma")

Covariance = tuple[tuple[float, ...], ...]


def independent(errors: dict[str, float]) -> Covariance:
    """Return the covariance of parameters with these relative standard errors, independent of each other."""
    return tuple(
        tuple(errors.get(row, 0.0) ** 2 if row == column else 0.0 for column in PARAMETERS) for row in PARAMETERS
    )


@dataclass(frozen=True)
class Machine:
    """Times are those of one rank.

    `shared_cores` is for ranks that share the cores of one machine, as on the site `local`: with more threads in all
    than there are cores, everything takes as many times longer. `covariance` is that of the logarithms of PARAMETERS,
    in their order: its diagonal holds the squares of their relative standard errors. `model_error` is what the model
    itself is wrong by, relative.
    """

    network: Network
    seconds_per_image: float  # forward and backward pass
    fixed_seconds: float = 0.0  # of each micro-batch however small
    update_seconds: float = 0.0  # the optimizer's, once a step
    input_seconds_per_image: float = 0.0  # reading and augmenting, on the cores that compute
    straggler_sigma: float = 0.0  # relative deviation of a rank's time for its work
    message_overhead_seconds: float = 0.0  # what each allreduce takes before MPI begins: Horovod's agreement
    algorithm: str = "best"
    start_seconds: float = 0.0  # from the job's start to its first step
    copy_bytes_per_second: float = 2e9  # of a checkpoint, out of the model; the writing goes on beside the training
    shared_cores: int | None = None
    threads_per_rank: int = 1
    covariance: Covariance = ()
    model_error: float = 0.0

    def slowdown(self, ranks: int) -> float:
        """How many times longer a rank's work takes because the ranks share their cores."""
        return max(1.0, ranks * self.threads_per_rank / self.shared_cores) if self.shared_cores else 1.0

    def micro_batch_seconds(self, images: int) -> float:
        """Forward and backward pass of one micro-batch on cores of its own."""
        return self.fixed_seconds + images * self.seconds_per_image
