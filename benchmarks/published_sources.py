"""Single-node rates and network figures for benchmarks.published_prediction, each with the place it comes from.

(m) marks what is from memory and was not read again.
"""

from dataclasses import dataclass

# PaddlePaddle with MKL-DNN on 2 x Xeon Gold 6148: training images/s by batch.
XEON_RESNET50 = ((64, 81.69), (128, 82.35), (256, 84.08))
XEON_ALEXNET = ((64, 399.00), (128, 498.94), (256, 626.53))


@dataclass(frozen=True)
class Parameter:
    """A number the prediction rests on: its value, the range that is published or possible, and its source."""

    what: str
    value: float
    low: float
    high: float
    unit: str
    source: str


PARAMETERS = {
    "knl_rate": Parameter(
        "ResNet-50 on a KNL 7250 node",
        79.0,
        70.0,
        79.0,
        "images/s",
        "KISTI Nurion, Intel Caffe on four nodes without I/O: 316. Low: a tenth less; AlexNet's published rates on "
        "this processor differ by more (640 there, 444 in github.com/intel/caffe issue 132 with a batch of 256)",
    ),
    "knl_rate_batch": Parameter(
        "images a node at which that rate was measured",
        64.0,
        16.0,
        256.0,
        "images",
        "not published; 64 is the smallest share of the same study's runs (32K on 512 nodes). High: the batch of Intel "
        "Caffe's own single-node benchmark of AlexNet (issue 132)",
    ),
    "one_thread": Parameter(
        "one thread of a Xeon Gold 6148 over one of a KNL 7250",
        3.43,
        1.71,
        5.0,
        "times",
        "Intel's specifications (m): 2.4 over 1.4 GHz, and 4 over 2 instructions decoded a cycle. Low: clocks alone",
    ),
    "xeon_speed": Parameter(
        "a node of 2 x Xeon Platinum 8160 over one of 2 x Gold 6148",
        1.0,
        0.95,
        1.09,
        "times",
        'Dell, "Deep Learning Performance with Intel Caffe" (March 2018): Gold 6148 and Platinum 8168 differ by about '
        "5 %. High: cores times AVX-512 clock (m)",
    ),
    "sigma": Parameter(
        "deviation of a node's time for the same work",
        0.024,
        0.002,
        0.04,
        "relative",
        'B. Acun, P. Miller, L. V. Kale, "Variation Among Processors Under Turbo Boost in HPC Systems": 16 % between '
        "the fastest and the slowest processor of a machine with turbo (Intel Caffe's wiki asks for it on both "
        "processors), less than 1 % on one without; 16 % is twice the expected largest of 1,000 normal deviations",
    ),
    "alpha": Parameter(
        "latency of a message between Xeon nodes",
        1.2e-6,
        1.0e-6,
        2.0e-6,
        "s",
        "Omni-Path's nominal microsecond; 1.2 and 1.5 us measured by osu_latency on Aries "
        "(gist.github.com/hppritcha/6a3acd0c192fcfd082bd543fc98e6fe6). On KNL times `one thread`: Omni-Path's protocol "
        "runs on the processor's cores",
    ),
    "bandwidth": Parameter(
        "bandwidth of a node",
        12.38e9,
        9.0e9,
        12.38e9,
        "bytes/s",
        "osu_mbw_mr, one pair of ranks, Omni-Path, Open MPI "
        "(gist.github.com/hppritcha/8da4436a216c9d96bf10ad9d403da03f). Low: where several ranks a node are needed to "
        "fill the link and one has to do (m)",
    ),
    "taper": Parameter(
        "nodes below a leaf switch over its links upwards",
        1.4,
        1.0,
        2.0,
        "times",
        "TACC's Stampede2 user guide: fat tree with an oversubscription of 28/20 (m). High: Nurion's, one half (m)",
    ),
    "gamma": Parameter(
        "adding float32 on one Xeon core, time a byte",
        2.5e-10,
        1.0e-10,
        5.0e-10,
        "s/byte",
        "12 bytes move for 4 that are added, at 12 GB/s a core (m). On KNL times `one thread`; over the communication "
        "processes of Intel Caffe, 2 on Xeon and 4 on KNL (the log in issue 132)",
    ),
    "evaluations": Parameter(
        "evaluations an epoch",
        1.0,
        0.0,
        1.0,
        "",
        "not published; forward pass over 50,000 images, split over the nodes",
    ),
}
