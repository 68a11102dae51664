"""What TCP makes of the link between two hosts, without MPI's or anyone else's part in it: run by mpirun on both.

Rank 0 prints a line of JSON: bytes a second one way, and each way when both send at the same time.
"""

import argparse
import socket
import threading
import time

from benchmarks.peers.work import print_line

_CHUNK = bytes(1 << 20)
_PORT = 20077


def main() -> None:
    """Connect the two ranks and send."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    host = MPI.COMM_WORLD.bcast(socket.gethostname())
    server = socket.create_server(("", _PORT)) if rank == 0 else None
    MPI.COMM_WORLD.Barrier()
    connection = server.accept()[0] if server else socket.create_connection((host, _PORT))
    count = arguments.megabytes
    transfer(connection, 8, 8)
    one_way = [transfer(connection, *((count, 0) if rank == 0 else (0, count))) for _ in range(arguments.repeats)]
    both = [transfer(connection, count, count) for _ in range(arguments.repeats)]
    if rank == 0:
        rates = {"one_way": one_way, "both_ways": both}
        sent = count * len(_CHUNK)
        print_line(**{f"{way}_bytes_per_second": [sent / seconds for seconds in took] for way, took in rates.items()})


def transfer(connection: socket.socket, send: int, receive: int) -> float:
    """Send and receive so many chunks at the same time, tell each other that all is there; return the seconds."""
    _agree(connection)
    started = time.perf_counter()
    sender = threading.Thread(target=_send, args=(connection, send))
    sender.start()
    buffer = bytearray(len(_CHUNK))
    left = receive * len(_CHUNK)
    while left:
        got = connection.recv_into(buffer, min(left, len(buffer)))
        if not got:
            raise ConnectionError("the other end has closed the connection")
        left -= got
    sender.join()
    _agree(connection)
    return time.perf_counter() - started


def _send(connection: socket.socket, chunks: int) -> None:
    for _ in range(chunks):
        connection.sendall(_CHUNK)


def _agree(connection: socket.socket) -> None:
    connection.sendall(b"x")
    if connection.recv(1) != b"x":
        raise ConnectionError("the other end has closed the connection")


if __name__ == "__main__":
    main()
