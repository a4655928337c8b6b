#!/usr/bin/env bash
# Everything that needs a GPU, within 10 minutes on an H100, or in parts:   benchmarks/gpu.sh [build] [test] [sanitize] [loss] [band] [fuse] [step]
# Needs no network beside an installed torch, triton, nvcc, pybind11 and scikit-build-core. The figures land in
# benchmarks/results/<device>.csv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

run_build() { "$python" -m pip install --quiet --no-build-isolation --no-deps --editable . -Ccmake.define.REFINE_FAST_CUDA=ON; }
run_test() { timeout 240 "$python" -m pytest --quiet tests/gpu; }

# Our CUDA kernels, and a loss of several ragged tiles. Allocations one by one, so that memcheck sees where each ends.
run_sanitize() {
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest --quiet tests/gpu/test_lerp.py tests/gpu/test_info_nce.py tests/gpu/test_band_topk.py \
      -k "tail or fuse_into or (float64 and ragged) or (equals_the_sort and 131) or searched_again or streamed"
  done
}

run_loss() { timeout 240 "$python" benchmarks/bench_gpu.py loss; }
run_band() { timeout 150 "$python" benchmarks/bench_gpu.py band; }
run_fuse() { timeout 90 "$python" benchmarks/bench_gpu.py fuse; }
run_step() { timeout 120 "$python" benchmarks/bench_gpu.py step; }  # needs transformers too

[ $# -gt 0 ] || set -- build test sanitize loss band fuse step
for part in "$@"; do
  printf '\n== %s (%d s)\n' "$part" $SECONDS
  "run_$part"
done
