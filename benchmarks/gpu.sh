#!/usr/bin/env bash
# Everything that needs a GPU:   benchmarks/gpu.sh [build] [test] [sanitize] [loss] [parts] [band] [fuse] [step]
#
# One call ends within 570 s, whatever hangs. Where a call is cut off after 10 minutes, three calls do it all (durations expected on an H100 with
# 16 cores; a build that is still there takes seconds):
#     benchmarks/gpu.sh build test sanitize      7 min: 1 the build, 2 the tests, 4 two sanitizers
#     benchmarks/gpu.sh build loss parts band    8 min: 4 the losses (half of it B = 1,048,576), 1 each kernel alone, 2 band_topk
#     benchmarks/gpu.sh build fuse step          3 min
# Each figure is in benchmarks/results/<device>.csv as soon as it is known, and a part that fails or runs out of time does not stop those behind
# it. If OUT names a folder, the log and the figures are copied there after every part. Without a git checkout, REFINE_FAST_COMMIT names the commit.
# Needs no network beside an installed torch, triton, nvcc, pybind11, scikit-build-core, pytest, pytest-timeout and hypothesis.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin  # nvcc and compute-sanitizer, where nothing else names them
readonly TOTAL=570
git rev-parse HEAD >/dev/null 2>&1 || export REFINE_FAST_COMMIT=${REFINE_FAST_COMMIT:-unknown}

run_build() { "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable . -Ccmake.define.REFINE_FAST_CUDA=ON; }

# What compiles for a GPU has passed where there is none; the time goes into Triton's compiler, so several processes where pytest has them.
run_test() {
  local workers=
  if "$python" -c "import xdist" 2>/dev/null; then workers="--numprocesses 6"; fi
  "$python" -m pytest --quiet --durations=10 --timeout=100 --timeout-method=thread $workers tests/gpu --ignore tests/gpu/test_compile.py
}

# Our CUDA kernels, and a loss of several ragged tiles. Allocations one by one, so that memcheck sees where each ends. What the tests say is their
# own: no errors of the CUDA calls with which libraries feel their way, no compilers that Triton starts.
run_sanitize() {
  local status=0 tool
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --foreground 150 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --report-api-errors no --target-processes application-only \
      "$python" -m pytest --quiet tests/gpu/test_lerp.py tests/gpu/test_info_nce.py tests/gpu/test_band_topk.py \
      -k "tail or fuse_into or (float64 and ragged) or (equals_the_sort and 131) or searched_again or streamed" || status=1
  done
  return $status
}

run_loss() { "$python" benchmarks/bench_gpu.py loss; }
run_parts() { "$python" benchmarks/bench_gpu.py parts; }
run_band() { "$python" benchmarks/bench_gpu.py band; }
run_fuse() { "$python" benchmarks/bench_gpu.py fuse; }
run_step() { "$python" benchmarks/bench_gpu.py step; }
declare -A limit=([build]=240 [test]=240 [sanitize]=310 [loss]=300 [parts]=120 [band]=170 [fuse]=90 [step]=150)
declare -A needs=([build]="pybind11 scikit_build_core" [test]="pytest pytest_timeout hypothesis triton" [sanitize]="pytest pytest_timeout hypothesis triton"
  [loss]=triton [parts]=triton [step]="transformers triton")

# Runs a part in a process group of its own, which ends at the part's limit or the call's.
part() {
  local missing left=$((TOTAL - SECONDS))
  missing=$("$python" -c "import sys; from importlib.util import find_spec; print(*[m for m in sys.argv[1:] if find_spec(m) is None])" ${needs[$1]-} torch)
  if [ -n "$missing" ]; then echo "not run: $python has no $missing" && return 1; fi
  if [ "$1" = sanitize ] && ! command -v compute-sanitizer; then echo "not run: no compute-sanitizer on the PATH" && return 1; fi
  if [ $left -lt 10 ]; then echo "not run: the call's $TOTAL s are over" && return 1; fi
  timeout --kill-after=5 $((left < limit[$1] ? left : limit[$1])) bash -c "$(declare -f "run_$1"); python=$python; run_$1"
}

save() { if [ -n "${OUT:-}" ]; then cp "$log" benchmarks/results/*.csv "$OUT"; fi; }

"$python" -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no GPU'); print(torch.cuda.get_device_name())" || exit 1
[ $# -gt 0 ] || set -- build test sanitize loss parts band fuse step
for name in "$@"; do
  if [ -z "${limit[$name]-}" ]; then echo "no part is called $name: build test sanitize loss parts band fuse step" >&2 && exit 2; fi
done
log=$(mktemp -d)/gpu.log
failed=
for name in "$@"; do
  printf '\n== %s (%d s)\n' "$name" $SECONDS
  part "$name" 2>&1 || { failed+=" $name" && printf '== %s FAILED (%d s)\n' "$name" $SECONDS; }
  save
done > >(tee "$log") 2>&1
wait $!
printf '\n== %d s; failed:%s\n' $SECONDS "${failed:- none}" | tee -a "$log"
save
[ -z "$failed" ]
