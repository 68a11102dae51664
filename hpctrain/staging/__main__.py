"""`python -m hpctrain.staging`, which is also data_prep/stage.py: stages shards, or with `env` the environment."""

import sys


def main() -> None:
    """Run `DATA LOCAL ...` or `env pack|unpack ...`; of the first, nothing is imported when the second is asked for."""
    if sys.argv[1:2] == ["env"]:
        from hpctrain.staging import environment

        environment.main(sys.argv[2:])
    else:
        from hpctrain.data.commands import run_standalone
        from hpctrain.staging.commands import stage_command

        run_standalone(stage_command)


if __name__ == "__main__":
    main()
