#!/usr/bin/env python3
"""Turn what ImageNet comes as into HDF5 shards, alone or under `mpirun`. The same as `hpctrain data prepare`."""

import sys

from hpctrain.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["data", "prepare"]
    main()
