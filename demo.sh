#!/usr/bin/env bash
# The main job, end to end: images -> shards -> training on two MPI ranks -> evaluation -> report. `make demo` calls it
# in a finished environment. Everything it makes is in the folder demo/; what is there already is not made again.
# With the argument `data` it stops when the shards are there.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

ranks=${RANKS:-2}
run_dir=demo/run-$(date +%Y%m%d-%H%M%S)

say() { printf '\n== %s\n' "$*"; }

show() { # print a command as one would type it, then run it
  printf '$ %s\n' "${*@Q}" | sed "s/'\([A-Za-z0-9_.\/=:-]*\)'/\1/g"
  "$@"
}

# Open MPI refuses to start as root, as in a container, unless told that it is meant.
if [[ $(id -u) == 0 ]]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

say 'A data set of real JPEG files: digits on photographs and stripes, 30 classes'
show python data_prep/make_sample.py demo/images

say 'Shards'
show hpctrain data prepare demo/images/train demo/shards --split train
show hpctrain data prepare demo/images/val demo/shards --split val
if [[ ${1:-} == data ]]; then
  exit
fi

say "Training with LARS on $ranks MPI ranks; on a cluster this is the line to type"
mpirun=(mpirun -n "$ranks")
if (($(nproc) < ranks)); then
  mpirun+=(--oversubscribe)
fi
show "${mpirun[@]}" hpctrain train demo --run-dir "$run_dir"

say 'Report'
show hpctrain report "$run_dir" --out demo/report
printf 'plots:  %s\n' demo/report/*.png
