#!/usr/bin/env python3
"""Copy shards (`stage.py DATA LOCAL`) or the Python environment (`stage.py env ...`) to node-local storage."""

from hpctrain.staging.__main__ import main

if __name__ == "__main__":
    main()
