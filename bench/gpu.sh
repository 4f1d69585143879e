#!/usr/bin/env bash
# What a machine with a GPU can tell, without git and without a network, in parts of at most eight minutes:
#
#   bench/gpu.sh check      # tests as compiled, over all cores, and memory checkers
#   bench/gpu.sh measure    # profile and benchmark suite
#   bench/gpu.sh explain    # variants of the kernels, a trace, Nsight Compute
#   bench/gpu.sh            # all three
#
# Into $OUT (bench/results) go gpu.log, which ends with what is wrong, env.json, check.xml, profile.json,
# the suite's results, variants.json, trace.json.gz and ncu.txt, as they come. The exit status is 0 if
# nothing failed and nothing was missing.
#
#   OUT=folder CHECK_SECONDS=460 MEASURE_SECONDS=460 EXPLAIN_SECONDS=460 PYTHON=python3 bench/gpu.sh
set -u
exec "${PYTHON:-python3}" "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/cli.py" gpu "$@"
