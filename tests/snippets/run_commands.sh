#!/usr/bin/env bash
# Runs every documented command in a copy of the source tree.  run_commands.sh COMMANDS SOURCE BUILD
set -u
work=$3/documented_commands
rm -rf "$work" && mkdir -p "$work"
tar -C "$2" --exclude=./build --exclude=./.git -cf - . | tar -C "$work" -xf -
cd "$work" || exit 1
failed=0
ran=0
while IFS= read -r line; do
    case $line in
        '' | '#'*) continue ;;
        *check.cmake*) continue ;; # this very test
    esac
    echo "\$ $line"
    if ! (eval "$line") > output.txt 2>&1; then
        echo "failed:"
        tail -n 30 output.txt
        failed=1
    fi
    ran=$((ran + 1))
done < "$1"
echo "$ran commands"
[ "$ran" -gt 0 ] && [ "$failed" = 0 ]
