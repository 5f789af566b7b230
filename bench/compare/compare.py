#!/usr/bin/env python3
"""polyattn beside PyTorch (SDPA, FlexAttention, torch.sparse, einsum), onnxruntime and DGL: the same inputs, one run, one thread and then two.

python3 bench/compare/compare.py BUILD [--n 4096] [--venv FOLDER]

BUILD is a build folder with the target bench_compare. The packages come from PyPI into a virtual environment of its own; where PyPI can't
be reached, or with POLYATTN_OFFLINE=1, this says so and prints polyattn's columns alone.
"""
import argparse, os, pathlib, statistics, subprocess, sys, tempfile, time, warnings

PACKAGES = ["torch==2.12.1", "onnxruntime==1.31.1", "onnx", "numpy", "scipy", "setuptools<70"]
LATE = [["--no-deps", "dgl==2.1.0"], ["networkx", "requests", "tqdm", "psutil", "pandas", "pyyaml", "pydantic", "torchdata"]]


def prepare(venv):
    """The environment's Python, or None."""
    python = venv / "bin" / "python"
    if os.environ.get("POLYATTN_OFFLINE"):
        print("POLYATTN_OFFLINE is set: polyattn's columns alone")
        return None
    if (venv / "ready").exists():
        return python
    print(f"installing {', '.join(PACKAGES)}, dgl into {venv} (some GB)", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        for packages in LATE:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"PyPI can't be reached or a package is missing ({error}): polyattn's columns alone")
        return None
    (venv / "ready").touch()
    return python


def ours(program, folder, case, n, window, threads):
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    result = subprocess.run([program, case, str(n), str(window), str(threads), folder], check=True, capture_output=True, text=True, env=environment)
    return [float(x) for x in result.stdout.split()]


def median_seconds(f):
    f()
    times, until = [], time.perf_counter() + 1
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 200):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(name, peer, theirs, mine, target=None, error=None):
    ratio = f"{theirs / mine:8.2f} x" if theirs else ""
    wanted = "" if target is None else f" (target {target:g} x: {'met' if theirs / mine >= target else 'missed'})"
    checked = "" if error is None else f", outputs differ by at most {error:.1e}"
    print(f"{name:34} {peer:26} {theirs * 1e3 if theirs else float('nan'):10.2f} {mine * 1e3:10.2f} ms {ratio}{wanted}{checked}", flush=True)


def compare(program, n, threads):
    import numpy, torch
    import torch.nn.functional as F

    folder = tempfile.mkdtemp()
    generator = numpy.random.default_rng(1)
    arrays = {name: generator.standard_normal((n, 64), dtype=numpy.float32) for name in ("q", "k", "v", "d_out")}
    for name, array in arrays.items():
        array.tofile(f"{folder}/{name}")
    q, k, v, d_out = (torch.from_numpy(a)[None, None] for a in arrays.values())
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def trained(f):
        def step():
            for leaf in leaves:
                leaf.grad = None
            f(*leaves).backward(d_out)
        return step

    def error(out):
        got = numpy.fromfile(f"{folder}/out", dtype=numpy.float32).reshape(n, 64)
        return float(numpy.abs(got - out.detach().numpy().reshape(n, 64)).max())

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    print(f"\nPyTorch {torch.__version__}; n = {n}, d = 64, one head, fp32, {threads} thread{'s' if threads > 1 else ''}{'':8}{'peer':>31} {'polyattn':>10}")

    # Dense and causal.
    mine = ours(program, folder, "dense", n, 0, threads)
    with torch.no_grad():
        out = F.scaled_dot_product_attention(q, k, v)
        row("dense, forward", "PyTorch SDPA", median_seconds(lambda: F.scaled_dot_product_attention(q, k, v)), mine[0], 1.3, error(out))
    row("dense, forward + backward", "PyTorch SDPA", median_seconds(trained(F.scaled_dot_product_attention)), mine[1], 1.2)
    try:
        session = onnx_attention(n, threads)
        feed = {name: arrays[name][None] for name in ("q", "k", "v")}
        out = torch.from_numpy(session.run(None, feed)[0])
        row("dense, forward", "onnxruntime", median_seconds(lambda: session.run(None, feed)), mine[0], 1.03, error(out))
    except Exception as problem:
        print(f"onnxruntime: {problem}")
    mine = ours(program, folder, "causal", n, 0, threads)
    causal = lambda a, b, c: F.scaled_dot_product_attention(a, b, c, is_causal=True)
    with torch.no_grad():
        row("causal, forward", "PyTorch SDPA", median_seconds(lambda: causal(q, k, v)), mine[0], 1, error(causal(q, k, v)))
    row("causal, forward + backward", "PyTorch SDPA", median_seconds(trained(causal)), mine[1], 1)

    # Windows and the local + global + random mask.
    ours(program, folder, "pairs", n, 0, threads)
    starts, keys = (numpy.fromfile(f"{folder}/{name}", dtype=numpy.int64) for name in ("starts", "keys"))
    rows = numpy.repeat(numpy.arange(n), numpy.diff(starts))
    for window in (128, 512):
        mine = ours(program, folder, "window", n, window, threads)
        half = window // 2
        flex(f"window {window}, forward", q, k, v, n, lambda b, h, i, j: (i - j <= half) & (j - i <= half), mine[0], 2, error)
    mine = ours(program, folder, "pattern", n, 0, threads)
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[torch.from_numpy(rows), torch.from_numpy(keys)] = True
    flex("local + global + random, forward", q, k, v, n, lambda b, h, i, j: mask[i, j], mine[0], 1, error)

    # The whole Diffuser operator: scores, softmax, 5 hops.
    mine = ours(program, folder, "diffuser", n, 0, threads)
    diffuser_sparse(torch, q[0, 0], k[0, 0], v[0, 0], starts, keys, n, mine, error)
    try:
        diffuser_dgl(torch, leaves, d_out[0, 0], rows, keys, n, mine, error)
    except Exception as problem:
        print(f"DGL: {problem}")

    for tokens in (n, 4 * n):
        linear_attention(torch, program, tokens, threads)

    # A training step of a decoder: 256 columns, 4 heads, 4 layers, AdamW.
    for tokens, batch in ((1024, 2), (4096, 1)):
        decoder(torch, program, folder, tokens, batch, threads)


def linear_attention(torch, program, n, threads):
    """ReLU features, no pair formed: two products and a division."""
    import numpy

    folder = tempfile.mkdtemp()
    generator = numpy.random.default_rng(2)
    arrays = {name: generator.standard_normal((n, 64), dtype=numpy.float32) for name in ("q", "k", "v", "d_out")}
    for name, array in arrays.items():
        array.tofile(f"{folder}/{name}")
    mine = ours(program, folder, "linear", n, 0, threads)
    leaves = [torch.from_numpy(arrays[name]).requires_grad_() for name in ("q", "k", "v")]
    d_out = torch.from_numpy(arrays["d_out"])

    def forward():
        q, k = torch.relu(leaves[0]), torch.relu(leaves[1])
        state = torch.einsum("nd,ne->de", k, leaves[2])
        return torch.einsum("nd,de->ne", q, state) / (torch.einsum("nd,d->n", q, k.sum(0)) + 1e-6)[:, None]

    def step():
        for leaf in leaves:
            leaf.grad = None
        forward().backward(d_out)

    with torch.no_grad():
        got = numpy.fromfile(f"{folder}/out", dtype=numpy.float32).reshape(n, 64)
        row(f"linear, ReLU, n = {n}, forward", "PyTorch einsum", median_seconds(forward), mine[0], 1.25 if n < 16384 else 1.5, float(numpy.abs(got - forward().numpy()).max()))
    row(f"linear, n = {n}, forward + backward", "PyTorch einsum", median_seconds(step), mine[1], 3)


def read_safetensors(path):
    import json, numpy

    data = pathlib.Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {name: numpy.frombuffer(data[start + e["data_offsets"][0]:start + e["data_offsets"][1]], numpy.float32).reshape(e["shape"]) for name, e in header.items() if name != "__metadata__"}


def decoder(torch, program, folder, n, batch, threads):
    import numpy
    import torch.nn.functional as F

    loss, mine = ours(program, folder, "decoder", n, 1, threads)
    _, sampled = ours(program, folder, "decoder", n, 4, threads)
    weights = {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in read_safetensors(f"{folder}/decoder.safetensors").items()}
    tokens, targets = (torch.from_numpy(numpy.fromfile(f"{folder}/{name}", dtype=numpy.int32).astype(numpy.int64)).reshape(batch, n) for name in ("tokens", "targets"))
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, weight_decay=0, fused=True)

    def norm(x, name):
        return F.layer_norm(x, (256,), weights[name + ".weight"], weights[name + ".bias"])

    def linear(x, name):
        return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    def step():
        optimizer.zero_grad(set_to_none=True)
        x = F.embedding(tokens, weights["embedding.weight"])
        for layer in range(4):
            block = f"block.{layer}."
            q, k, v = (part.reshape(batch, n, 4, 64).transpose(1, 2) for part in linear(norm(x, block + "attention_norm"), block + "attention.project").split(256, -1))
            x = x + linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, n, 256), block + "attention.merge")
            x = x + linear(F.gelu(linear(norm(x, block + "feed_forward_norm"), block + "feed_forward.up")), block + "feed_forward.down")
        result = F.cross_entropy(linear(norm(x, "block.norm"), "head").reshape(-1, 256), targets.reshape(-1))
        result.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1)
        optimizer.step()
        return result.item()

    difference = abs(step() - loss)
    theirs = median_seconds(step)
    row(f"decoder step, n = {n} x {batch}", "PyTorch, AdamW", theirs, mine, 1.2, difference)
    row(f"the same, ours with SSA-L4", "PyTorch, AdamW, dense", theirs, sampled, 1.7 if n == 4096 else None)


def onnx_attention(n, threads):
    import onnx, onnxruntime
    from onnx import TensorProto, helper

    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n, 64])
    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["out"], domain="com.microsoft", num_heads=1)
    graph = helper.make_graph([node], "attention", [value("q"), value("k"), value("v")], [value("out")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def flex(name, q, k, v, n, mask, mine, target, error):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    try:
        torch._dynamo.reset()
        with torch.no_grad():
            best, out = None, None
            for block in (32, 128):
                blocks = create_block_mask(mask, 1, 1, n, n, device="cpu", BLOCK_SIZE=block)
                compiled = torch.compile(flex_attention, dynamic=False)
                out = compiled(q, k, v, block_mask=blocks)
                seconds = median_seconds(lambda: compiled(q, k, v, block_mask=blocks))
                best = seconds if best is None else min(best, seconds)
            row(name, "FlexAttention, compiled", best, mine, target, error(out))
    except Exception as problem:
        print(f"FlexAttention: {str(problem).splitlines()[0]}")


def diffuser_sparse(torch, q, k, v, starts, keys, n, mine, error):
    starts, keys = torch.from_numpy(starts), torch.from_numpy(keys)
    lengths = starts[1:] - starts[:-1]
    pattern = torch.sparse_csr_tensor(starts, keys, torch.zeros(keys.numel()), (n, n))

    def forward():
        scores = torch.sparse.sampled_addmm(pattern, q, k.T, beta=0, alpha=1 / 8).values()
        highest = torch.segment_reduce(scores, "max", lengths=lengths)
        weights = torch.exp(scores - torch.repeat_interleave(highest, lengths))
        weights = weights / torch.repeat_interleave(torch.segment_reduce(weights, "sum", lengths=lengths), lengths)
        a = torch.sparse_csr_tensor(starts, keys, weights, (n, n))
        z = v
        for _ in range(5):
            z = .9 * (a @ z) + .1 * v
        return z

    with torch.no_grad():
        row("Diffuser, PPR<5>, forward", "torch.sparse CSR", median_seconds(forward), mine[0], 4.5, error(forward()))


def diffuser_dgl(torch, leaves, d_out, rows, keys, n, mine, error):
    # DGL 2.1 imports its graph storage eagerly, which recent PyTorch versions have no library for; the operators don't need it.
    import types
    module = types.ModuleType("dgl.graphbolt")
    sys.modules["dgl.graphbolt"] = module
    os.environ["DGLBACKEND"] = "pytorch"
    import dgl
    import dgl.function as fn
    from dgl.nn.functional import edge_softmax

    graph = dgl.graph((torch.from_numpy(keys), torch.from_numpy(rows)), num_nodes=n)

    def operator(q, k, v):
        with graph.local_scope():
            graph.ndata["q"], graph.ndata["k"] = q[0, 0], k[0, 0]
            graph.apply_edges(fn.v_dot_u("q", "k", "s"))
            graph.edata["a"] = edge_softmax(graph, graph.edata["s"] / 8)
            z = v[0, 0]
            for _ in range(5):
                graph.ndata["z"] = z
                graph.update_all(fn.u_mul_e("z", "a", "m"), fn.sum("m", "z"))
                z = .9 * graph.ndata["z"] + .1 * v[0, 0]
            return z

    with torch.no_grad():
        out = operator(*leaves)
        row("Diffuser, PPR<5>, forward", "DGL", median_seconds(lambda: operator(*leaves)), mine[0], 30, error(out))

    def step():
        for leaf in leaves:
            leaf.grad = None
        operator(*leaves).backward(d_out)

    row("Diffuser, PPR<5>, forward + backward", "DGL", median_seconds(step), mine[1], 30)


def alone(program, n):
    import array, random

    folder = tempfile.mkdtemp()
    random.seed(1)
    for name in ("q", "k", "v", "d_out"):
        with open(f"{folder}/{name}", "wb") as file:
            array.array("f", (random.gauss(0, 1) for _ in range(n * 64))).tofile(file)
    for threads in (1, 2):
        print(f"\nn = {n}, d = 64, one head, fp32, {threads} threads: forward, forward + backward")
        for windows in (1, 4):
            print(f"decoder step, SSA-L{windows:<9} {ours(program, folder, 'decoder', n, windows, threads)[1] * 1e3:10.2f} ms")
        for case, window in (("dense", 0), ("causal", 0), ("window", 128), ("window", 512), ("pattern", 0), ("diffuser", 0), ("linear", 0)):
            forward, both, _ = ours(program, folder, case, n, window, threads)
            print(f"{case + (f' {window}' if window else ''):20} {forward * 1e3:10.2f} ms {both * 1e3:10.2f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--venv", type=pathlib.Path, default=pathlib.Path("build/compare-venv"))
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    program = options.build.resolve() / "bench" / "compare"
    if not program.exists():
        sys.exit(f"{program} is not there; cmake --build {options.build} --target bench_compare makes it")
    if options.threads:
        return compare(program, options.n, options.threads)
    python = prepare(options.venv.resolve())
    if python is None:
        return alone(program, options.n)
    # A process and a cache each: kernels that PyTorch compiles for one thread have no buffers for a second.
    for threads in (1, 2):
        with tempfile.TemporaryDirectory() as cache:
            environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache, OMP_NUM_THREADS=str(threads))
            subprocess.run([python, __file__, options.build, "--n", str(options.n), "--threads", str(threads)], env=environment, check=True)


if __name__ == "__main__":
    main()
