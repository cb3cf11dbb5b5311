#!/usr/bin/env bash
# One command for a machine with a GPU: builds, tests, sanitizes and measures fastgan. About ten minutes on 16 cores and
# an H200. Needs nvcc and a CUDA build of PyTorch in `python3`; no network.
#
#     benchmarks/gpu/run.sh OUT_DIR
#
# OUT_DIR gets a log a step, results as JSON, and summary.txt. A step that fails or runs out of time does not stop the
# ones after it.
set -u -o pipefail
cd "$(dirname "$0")/../.."
out=$(mkdir -p "${1:?usage: benchmarks/gpu/run.sh OUT_DIR}" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
architecture=$(python3 -c 'import torch; c = torch.cuda.get_device_capability(); print("%d%d%s" % (*c, "a" if c[0] == 9 else ""))')

step() {  # name, seconds at most, command: runs it, keeps its log, notes how it ended
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  local ended="ok"
  [ $code -ne 0 ] && ended="exit $code"
  [ $code -eq 124 ] && ended="stopped after $limit s"
  printf '%-32s %-22s %4d s  %s\n' "$name" "$ended" $((SECONDS - begin)) "$(tail -n 1 "$out/$name.log" | cut -c1-120)" |
    tee -a "$out/summary.txt"
}

environment() {
  nvidia-smi && nvcc --version && python3 -m torch.utils.collect_env && git log -1 --format='%H %cd'
}

build_native_test() {  # the kernels' own tests, no PyTorch
  nvcc -std=c++17 -O3 -gencode="arch=compute_$architecture,code=sm_$architecture" -lineinfo -x cu "csrc/cuda/$1.cu" \
    "tests/native/cuda/test_$1.cpp" -o "$work/$1"
}

install() {
  MAX_JOBS=16 TORCH_CUDA_ARCH_LIST="${architecture:0:1}.${architecture:1}" FASTGAN_CUDA=1 \
    python3 -m pip install --no-build-isolation --no-deps .
}

: > "$out/summary.txt"
step environment 60 environment
step install 300 install &
for stem in bn_act softmax_entropy conv4x4s2; do step "build_$stem" 200 build_native_test "$stem" & done
wait
for stem in bn_act softmax_entropy conv4x4s2; do step "native_$stem" 60 "$work/$stem"; done
for tool in memcheck racecheck; do
  for stem in bn_act softmax_entropy conv4x4s2; do
    step "${tool}_$stem" 60 compute-sanitizer --tool $tool --error-exitcode 1 "$work/$stem" 6 &
  done
done
wait
# From another folder, so that the installed package is the one that is imported.
here=$PWD
cd "$work"
step pytest_cuda 150 python3 -m pytest -o addopts= -q -k cuda -p no:cacheprovider "$here/tests" \
  --ignore="$here/tests/test_cuda_host.py" --ignore="$here/tests/test_cuda_compile.py"
step ops 120 python3 "$here/benchmarks/gpu/ops.py" --output "$out/ops.json"
step train_step 240 python3 "$here/benchmarks/gpu/train_step.py" --output "$out/train_step.json" --seconds 210
cat "$out/summary.txt"
