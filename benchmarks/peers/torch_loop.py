"""PyTorch at its best known settings on CPUs: channels_last, autocast for bfloat16, the fused optimizer.

Several processes are DistributedDataParallel over gloo, with gradients that live in its buckets and a static graph.
"""

import os
from contextlib import nullcontext
from typing import Any

from benchmarks.peers.work import parse_work, time_steps


def main() -> None:
    """Train as one of the processes."""
    work = parse_work()
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks.peers import torch_networks

    torch.set_num_threads(work.threads)
    model: Any = torch_networks.build(work.model, work.classes).to(memory_format=torch.channels_last)
    if work.processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(work.ports[0]))
        torch.distributed.init_process_group("gloo", rank=work.process, world_size=work.processes)
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9, fused=True)
    images = torch.randn(work.micro_batch, 3, work.image_size, work.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(work.classes, [work.micro_batch])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if work.bfloat16 else nullcontext():
            logits = model(images)
        loss = cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    time_steps(work, step)
    if work.processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
