#!/usr/bin/env bash
# One command for a machine with a GPU: builds, tests, sanitizes and measures fastgan, without a network. Needs a CUDA
# build of PyTorch in `python3`, and nvcc for what is built.
#
#     benchmarks/gpu/run.sh OUT_DIR [STEP...]
#
# Steps, all by default and always in this order, with the seconds each may take:
#     environment  60      what machine this is
#     install     300      builds fastgan and installs it; FASTGAN_WHEEL=path installs that wheel instead. Leave the step
#                          out to measure what is installed already
#     native      200 + 60 the kernels' own tests, without PyTorch (built beside install)
#     sanitize    60       compute-sanitizer over them (built if native is left out)
#     pytest      300      the CUDA tests
#     main_loops  200 + 40 the loops of the convolutions alone, batch 128 and 1024 (built beside install)
#     memory_kernels 200 + 40 the kernels that memory bounds, alone (built beside install)
#     cudnn       70       each direction of each convolution against cuDNN's
#     ops         90       each layer, and CatGAN's loss
#     train_step  260      whole training steps
#     profile     60       the kernels of a step: PROFILE, a configuration (default "fastgan bf16")
#
# CUDNN_OPTIONS, OPS_OPTIONS, TRAIN_STEP_OPTIONS, PROFILE_OPTIONS: what these scripts are given besides.
# OUT_DIR gets summary.txt, logs.txt and the results as JSON: at most five files. A step that fails or runs out of time
# does not stop the ones after it.
set -u -o pipefail
cd "$(dirname "$0")/../.."
here=$PWD
out=$(mkdir -p "${1:?usage: benchmarks/gpu/run.sh OUT_DIR [STEP...]}" && cd "$1" && pwd)
shift
known="environment install native sanitize pytest main_loops memory_kernels cudnn ops train_step profile"
wanted=" ${*:-$known} "
for name in $wanted; do
  [[ " $known " == *" $name "* ]] || { echo "run.sh: no step '$name'; there are: $known" >&2; exit 2; }
done
wheel=${FASTGAN_WHEEL:+$(realpath "$FASTGAN_WHEEL")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stems=$(basename -s .cu csrc/cuda/*.cu | xargs)
export PYTHONUNBUFFERED=1

wants() { [[ "$wanted" == *" $1 "* ]]; }

step() {  # name, seconds at most, command: runs it, keeps its log, notes how it ended
  local name=$1 limit=$2 begin=$SECONDS code=0 log="$work/$1.log"
  shift 2
  timeout "$limit" "$@" > "$log" 2>&1 || code=$?
  local ended="ok"
  [ $code -ne 0 ] && ended="exit $code"
  [ $code -eq 124 ] && ended="stopped after $limit s"
  {
    flock 9  # steps run side by side
    { echo "==== $name: $ended"; tail -c 1000000 "$log"; } >> "$out/logs.txt"
    printf '%-24s %-20s %4d s  %s\n' "$name" "$ended" $((SECONDS - begin)) "$(tail -n 1 "$log" | cut -c1-120)" |
      tee -a "$out/summary.txt"
  } 9> "$work/lock"
  return $code
}

shown_step() {  # as step, and its log is shown too
  step "$@"
  cut -c1-200 "$work/$1.log" | tail -n 120
}

architecture() {  # of this machine's GPU, as nvcc names it
  python3 -c 'import torch; c = torch.cuda.get_device_capability(); print("%d%d%s" % (*c, "a" if c[0] == 9 else ""))'
}

environment() {
  nvidia-smi
  nvcc --version
  python3 -m torch.utils.collect_env
  git log -1 --format='%H %cd'
}

install() {
  local arch
  if [ -n "$wheel" ]; then
    python3 -m pip install --no-deps --no-index --force-reinstall "$wheel"
  else
    arch=$(architecture | sed 's/[0-9]a\?$/.&/')  # 90a: 9.0a
    MAX_JOBS=16 TORCH_CUDA_ARCH_LIST="$arch" FASTGAN_CUDA=1 \
      python3 -m pip install --no-build-isolation --no-deps .
  fi && cd / && python3 -c 'import fastgan; print(fastgan.build_info()["version"], fastgan.__file__)'
}

nvcc_for() {  # architecture, further arguments
  local hopper=()
  [ "$1" = 90a ] && hopper=(-DFASTGAN_HOPPER)  # as setup.py
  nvcc -std=c++17 -O3 -gencode="arch=compute_$1,code=sm_$1" "${hopper[@]}" -lineinfo -x cu "${@:2}"
}

build_native() { nvcc_for "$2" "csrc/cuda/$1.cu" "tests/native/cuda/test_$1.cpp" -o "$work/$1"; }

build_main_loops() {
  nvcc_for "$1" benchmarks/gpu/main_loops.cpp csrc/cuda/conv4x4s2.cu csrc/cuda/bn_act.cu -o "$work/main_loops"
}

build_memory_kernels() {
  nvcc_for "$1" benchmarks/gpu/memory_kernels.cpp csrc/cuda/bn_act.cu csrc/cuda/softmax_entropy.cu -o "$work/memory_kernels"
}

run_main_loops() { "$work/main_loops" 128 && "$work/main_loops" 1024 && "$work/main_loops" 128 tf32; }

export -f environment install nvcc_for build_native build_main_loops build_memory_kernels run_main_loops architecture
export work wheel here

: > "$out/summary.txt"
: > "$out/logs.txt"
wants environment && step environment 60 bash -c environment
wants install && step install 300 bash -c install &
arch=$(architecture)
wants main_loops && step build_main_loops 200 bash -c "build_main_loops $arch" &
wants memory_kernels && step build_memory_kernels 200 bash -c "build_memory_kernels $arch" &
if wants native || wants sanitize; then
  for stem in $stems; do step "build_$stem" 200 bash -c "build_native $stem $arch" & done
fi
wait
wants native && for stem in $stems; do step "native_$stem" 60 "$work/$stem"; done
if wants sanitize; then
  for tool in memcheck racecheck; do
    for stem in $stems; do
      step "${tool}_$stem" 60 compute-sanitizer --tool $tool --error-exitcode 1 "$work/$stem" 6 &
    done
  done
  wait
fi
# From another folder, so that the installed package is the one that is imported.
cd "$work"
# Without the kernels the tests would be left out, not fail.
kernels="import fastgan, sys; sys.exit(not fastgan.build_info()['cuda_kernels'])"
wants pytest && step kernels 60 python3 -c "$kernels"
python3 -c "import xdist" 2> /dev/null && workers="-n $(nproc) --dist loadfile"
wants pytest && step pytest 300 python3 -m pytest -o addopts= -q -rs -k cuda -p no:cacheprovider "$here/tests" ${workers:-} \
  --ignore-glob="$here/tests/test_cuda_*host.py" --ignore="$here/tests/test_cuda_compile.py" \
  --ignore="$here/tests/test_docs.py" --ignore="$here/tests/test_notebook.py"
wants main_loops && shown_step main_loops 40 bash -c run_main_loops
wants memory_kernels && shown_step memory_kernels 40 "$work/memory_kernels"
measure="$here/benchmarks/gpu"
wants cudnn && shown_step cudnn 70 python3 "$measure/cudnn.py" --output "$out/cudnn.json" ${CUDNN_OPTIONS:-}
wants ops && shown_step ops 90 python3 "$measure/ops.py" --output "$out/ops.json" ${OPS_OPTIONS:-}
wants train_step && shown_step train_step 260 \
  python3 "$measure/train_step.py" --output "$out/train_step.json" --seconds 210 ${TRAIN_STEP_OPTIONS:-}
wants profile && shown_step profile 60 \
  python3 "$measure/train_step.py" --profile "${PROFILE:-fastgan bf16}" ${PROFILE_OPTIONS:-}
echo
cat "$out/summary.txt"
