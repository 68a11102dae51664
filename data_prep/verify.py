#!/usr/bin/env python3
"""Check every byte of a data set of HDF5 shards. The same as `hpctrain data verify`."""

from hpctrain.data.commands import run_standalone, verify_command

if __name__ == "__main__":
    run_standalone(verify_command)
