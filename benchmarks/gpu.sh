#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU.
#
#     benchmarks/gpu.sh [PART]...        all parts, in the order below, when none is named
#
# One call ends within 350 s, whatever hangs. Two calls do everything, the most important parts first
# (durations expected on an H100 with 16 cores; a build that is still there takes seconds):
#     benchmarks/gpu.sh build test target band fuse              5 min: 1 build, 1.5 tests, 1 the loss at
#                                                                B = 65,536, 1 band_topk, 0.5 fuse_into
#     benchmarks/gpu.sh build parts loss step huge sanitize      6 min: 1 each kernel alone, 0.5 B = 16,384,
#                                                                1 a training step, 1 B = 1,048,576,
#                                                                sanitizers with what is left
#
# Every figure is written to benchmarks/results/<device>.csv as soon as its shape is measured, so a call
# that is killed keeps what it had. A part that fails or runs out of time does not stop the later ones.
# If OUT names a folder, the log and the figures are copied there every 10 s and after every part.
# Without a git checkout, REFINE_FAST_COMMIT names the commit.
#
# Needs no network besides an installed torch, triton, nvcc, pybind11, scikit-build-core, pytest,
# pytest-timeout and hypothesis. memeff, a peer of the loss, is optional: PYTHONPATH may name its
# unpacked wheel (pip download memeff --no-deps). PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin  # nvcc and compute-sanitizer, if they are not on the PATH yet
readonly TOTAL=${TOTAL:-350}
readonly PARTS="build test target band fuse parts loss step huge sanitize"
git rev-parse HEAD >/dev/null 2>&1 || export REFINE_FAST_COMMIT=${REFINE_FAST_COMMIT:-unknown}

run_build() {
  "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable . \
    -Ccmake.define.REFINE_FAST_CUDA=ON
}

# Not test_compile.py, which needs no GPU. Triton's compiler takes most of the time, so several processes
# share it where pytest-xdist is installed.
run_test() {
  local workers=
  if "$python" -c "import xdist" 2>/dev/null; then workers="--numprocesses 8"; fi
  "$python" -m pytest --quiet --durations=10 --timeout=100 --timeout-method=thread $workers \
    tests/gpu tests/test_band_topk.py tests/test_info_nce.py tests/test_info_nce_inputs.py \
    --ignore tests/gpu/test_compile.py -k "gpu or triton or cuda"
}

# Our CUDA kernels, and a loss of several ragged tiles. Without torch's allocator cache, so that memcheck
# sees where each allocation ends. Only errors of our own kernels count: not the CUDA calls with which
# libraries probe the device, nor the compilers that Triton starts.
run_sanitize() {
  local status=0 tool
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --foreground 150 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --report-api-errors no --target-processes application-only \
      "$python" -m pytest --quiet tests/gpu/test_lerp.py tests/gpu/test_info_nce.py tests/gpu/test_band_topk.py \
      tests/test_band_topk.py \
      -k "tail or fuse_into or (float64 and ragged) or (equals_the_sort and 131 and cuda) or searched_again or streamed" ||
      status=1
  done
  return $status
}

run_target() { "$python" benchmarks/bench_gpu.py target; }
run_band() { "$python" benchmarks/bench_gpu.py band; }
run_fuse() { "$python" benchmarks/bench_gpu.py fuse; }
run_parts() { "$python" benchmarks/bench_gpu.py parts; }
run_loss() { "$python" benchmarks/bench_gpu.py loss; }
run_step() { "$python" benchmarks/bench_gpu.py step; }
run_huge() { "$python" benchmarks/bench_gpu.py huge; }
declare -A limit=(
  [build]=120 [test]=130 [target]=90 [band]=90 [fuse]=60
  [parts]=80 [loss]=60 [step]=90 [huge]=80 [sanitize]=310
)
declare -A needs=(
  [build]="pybind11 scikit_build_core" [test]="pytest pytest_timeout hypothesis triton"
  [sanitize]="pytest pytest_timeout hypothesis triton"
  [target]=triton [loss]=triton [huge]=triton [parts]=triton [step]="transformers triton"
)

# Runs a part in its own process group, which ends at the part's limit or the call's.
part() {
  local missing left=$((TOTAL - SECONDS))
  missing=$("$python" -c "import sys; from importlib.util import find_spec
print(*[m for m in sys.argv[1:] if find_spec(m) is None])" ${needs[$1]-} torch)
  if [ -n "$missing" ]; then echo "not run: $python lacks $missing" && return 1; fi
  if [ "$1" = sanitize ] && ! command -v compute-sanitizer; then echo "not run: no compute-sanitizer on the PATH" && return 1; fi
  if [ $left -lt 10 ]; then echo "not run: the call's $TOTAL s are over" && return 1; fi
  timeout --kill-after=5 $((left < limit[$1] ? left : limit[$1])) bash -c "$(declare -f "run_$1"); python=$python; run_$1"
}

save() {
  if [ -n "${OUT:-}" ]; then
    cp "$log" "$OUT"
    find benchmarks/results -name '*.csv' -exec cp {} "$OUT" \;
  fi
}

"$python" -c "import sys, torch
torch.cuda.is_available() or sys.exit('torch sees no GPU')
print(torch.cuda.get_device_name())" || exit 1
[ $# -gt 0 ] || set -- $PARTS
for name in "$@"; do
  if [ -z "${limit[$name]-}" ]; then echo "no part is called $name: $PARTS" >&2 && exit 2; fi
done
log=$(mktemp -d)/gpu.log
exec > >(tee "$log") 2>&1
if [ -n "${OUT:-}" ]; then
  (while sleep 10; do save; done) &
  saver=$!
  trap 'kill $saver' EXIT
fi
failed=
for name in "$@"; do
  printf '\n== %s (%d s)\n' "$name" $SECONDS
  part "$name" || { failed+=" $name" && printf '== %s FAILED (%d s)\n' "$name" $SECONDS; }
  save
done
printf '\n== %d s; failed:%s\n' $SECONDS "${failed:- none}"
sleep 0.2  # tee writes the last lines
save
[ -z "$failed" ]
