# The share of fused multiply-adds in the innermost loops that have some, of each kernel in a PTX file. Fails if one of `kernels` is below `least`.
/^[ \t]*\.(visible |weak )*entry|\.entry / { match($0, /_Z[A-Za-z0-9_]+/); kernel = substr($0, RSTART, RLENGTH); line = 0; delete label; next }
/^\$L/ { sub(/:.*/, ""); label[$0] = line; next }
/^[ \t]+(@!?%p[0-9]+ +)?[a-z][a-z0-9_.]*[ \t]/ && kernel != "" {
    text = $0
    sub(/^[ \t]+/, "", text)
    sub(/^@!?%p[0-9]+[ \t]+/, "", text)
    operation[line] = text
    if (text ~ /^bra/) {
        target = text
        sub(/^[^$]*/, "", target)
        sub(/;.*/, "", target)
        if (target in label && label[target] <= line) {
            multiply = 0
            inner = 1
            for (i = label[target]; i < line; ++i) {
                if (operation[i] ~ /^fma/) ++multiply
                if (operation[i] ~ /^bra/) inner = 0
            }
            length_of_loop = line + 1 - label[target]
            if (inner && multiply >= 16 && kernel ~ kernels) {
                ++found
                printf "%-28s %3d of %3d instructions, %2d %%\n", match(kernel, kernels) ? substr(kernel, RSTART, RLENGTH) : kernel, multiply, length_of_loop, 100 * multiply / length_of_loop
                if (100 * multiply < least * length_of_loop) failed = 1
            }
        }
    }
    ++line
}
END {
    if (!found) print "no such loops"
    exit failed || !found
}
