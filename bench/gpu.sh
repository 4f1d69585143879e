#!/usr/bin/env bash
# Runs the tests and then the benchmark suite on this machine's GPU, within ten minutes and without
# a network. Writes tests.log, suite.log and the results into $OUT (bench/results).
# A failing test does not keep the benchmark from running; any failure makes the exit status 1.
#
#   OUT=folder TESTS_SECONDS=240 SUITE_SECONDS=320 PYTHON=python3 bench/gpu.sh
set -uo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd) || exit 1
out=${OUT:-$root/bench/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit 1

python=${PYTHON:-python3}
tests_seconds=${TESTS_SECONDS:-240}
suite_seconds=${SUITE_SECONDS:-320}
export PYTHONUNBUFFERED=1  # or a log would lose its end when the time is over
failed=()

# name, seconds, command...: logs a command and notes its failure.
run() {
    local name=$1 seconds=$2 status
    shift 2
    echo "== $name: at most $seconds s"
    timeout -k 10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 124 ] && echo "$name: stopped after $seconds s" | tee -a "$out/$name.log"
    [ "$status" -eq 0 ] || failed+=("$name (exit status $status)")
}

run tests "$tests_seconds" "$python" tests/run.py

# The interpreter that has, or that was made to have, all that is needed: as tests/run.py uses it.
find='import sys; sys.path.insert(0, "bench"); import bootstrap; print(bootstrap.prepare()[0])'
if suite_python=$("$python" -c "$find" | tail -n 1) && [ -n "$suite_python" ]; then
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    device=$("$suite_python" -c \
        'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
    [ "$device" = cuda ] || failed+=("no GPU: measured on the CPU")
    run suite "$suite_seconds" "$suite_python" -m fusedcalib.bench.suite \
        --out "$out" --seconds $((suite_seconds - 50))  # the case under way then may end
else
    failed+=("suite (no Python that can run it)")
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" | tee "$out/failed.log" >&2
    exit 1
fi
rm -f "$out/failed.log"
echo "all passed; results are in $out"
