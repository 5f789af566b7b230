#!/usr/bin/env bash
# Runs every documented command in a copy of the source tree.  run_commands.sh COMMANDS SOURCE BUILD
set -u
work=$3/documented_commands
rm -rf "$work" && mkdir -p "$work"
tar -C "$2" --exclude=./build --exclude=./.git -cf - . | tar -C "$work" -xf -
cd "$work" || exit 1
# What takes minutes or gigabytes does the least that still shows that the command works; programs whose times nobody reads are little optimised.
echo 'set(CMAKE_CXX_FLAGS_RELEASE "-O1 -DNDEBUG" CACHE STRING "")
set(CMAKE_CUDA_FLAGS_RELEASE "-O1 -DNDEBUG" CACHE STRING "")' > build_quickly.cmake
export CMAKE_TOOLCHAIN_FILE=$work/build_quickly.cmake POLYATTN_OFFLINE=1 POLYATTN_SUMMARY_FILTER='dense/n:1024/d:64|n:4096/g:96' POLYATTN_COMPARE_SECONDS=0.01
failed=0
ran=0
while IFS= read -r line; do
    case $line in
        '' | '#'*) continue ;;
        *check.cmake*) continue ;; # this very test
        python3*) command -v python3 > /dev/null || { echo "no python3, not run: $line"; continue; } ;;
    esac
    echo "\$ $line"
    if ! (eval "$line") > output.txt 2>&1; then
        echo "failed:"
        tail -n 30 output.txt
        failed=1
    fi
    ran=$((ran + 1))
done < "$1"
# The benchmarks that they built check their results before they time anything.
cases=0
while read -r program filter; do
    echo "$program, $filter"
    if ! "build/bench/bench/$program" "--benchmark_filter=$filter" --benchmark_min_time=0.001 > output.txt 2>&1 || grep -E 'ERROR OCCURRED|Failed to match' output.txt; then
        echo "failed:"
        tail -n 30 output.txt
        failed=1
    fi
    cases=$((cases + 1))
done < build/bench/bench/smallest_cases.txt
echo "$ran commands, $cases benchmarks"
[ "$ran" -gt 0 ] && [ "$cases" -gt 0 ] && [ "$failed" = 0 ]
