#!/usr/bin/env python3
"""Turn a folder of images, one folder per class, into HDF5 shards. The same as `hpctrain data prepare`."""

from hpctrain.data.commands import prepare_command, run_standalone

if __name__ == "__main__":
    run_standalone(prepare_command)
