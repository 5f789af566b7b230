"""Writes tiny_bert.safetensors: a small encoder in BERT's layout with random weights, two inputs, and what numpy says of them."""
import json
import struct
from math import erf

import numpy as np

layers, dim, heads, hidden, vocabulary, positions = 2, 8, 2, 12, 11, 10
rng = np.random.default_rng(2023)
tensors = {}


def draw(name, *shape, around=0.0):
    tensors[name] = around + rng.normal(size=shape) * 0.4
    return tensors[name]


def norm(name, x):
    weight, bias = tensors[name + ".weight"], tensors[name + ".bias"]
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * weight + bias


def linear(name, x):
    return x @ tensors[name + ".weight"].T + tensors[name + ".bias"]


for name, rows in ("word", vocabulary), ("position", positions), ("token_type", 2):
    draw(f"bert.embeddings.{name}_embeddings.weight", rows, dim)
names = ["bert.embeddings.LayerNorm"]
for layer in range(layers):
    prefix = f"bert.encoder.layer.{layer}."
    for part in "query", "key", "value":
        draw(prefix + f"attention.self.{part}.weight", dim, dim)
        draw(prefix + f"attention.self.{part}.bias", dim)
    for part, rows, columns in ("attention.output.dense", dim, dim), ("intermediate.dense", hidden, dim), ("output.dense", dim, hidden):
        draw(prefix + part + ".weight", rows, columns)
        draw(prefix + part + ".bias", rows)
    names += [prefix + "attention.output.LayerNorm", prefix + "output.LayerNorm"]
for name in names:
    draw(name + ".weight", dim, around=1.0)
    draw(name + ".bias", dim)

gelu = np.vectorize(lambda x: 0.5 * x * (1 + erf(x / 2**0.5)))
for number, tokens in enumerate(([1, 4, 9, 4, 0, 10, 7], [3])):
    x = tensors["bert.embeddings.word_embeddings.weight"][tokens] + tensors["bert.embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm("bert.embeddings.LayerNorm", x + tensors["bert.embeddings.token_type_embeddings.weight"][0])
    for layer in range(layers):
        prefix = f"bert.encoder.layer.{layer}."
        q, k, v = (linear(prefix + "attention.self." + part, x).reshape(len(tokens), heads, -1).transpose(1, 0, 2) for part in ("query", "key", "value"))
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(dim // heads))
        context = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(tokens), dim)
        x = norm(prefix + "attention.output.LayerNorm", x + linear(prefix + "attention.output.dense", context))
        x = norm(prefix + "output.LayerNorm", x + linear(prefix + "output.dense", gelu(linear(prefix + "intermediate.dense", x))))
    tensors[f"input.{number}"] = np.array(tokens, dtype=np.float64)
    tensors[f"output.{number}"] = x

header, data = {}, b""
for name, tensor in tensors.items():
    raw = np.ascontiguousarray(tensor, dtype="<f8").tobytes()
    header[name] = {"dtype": "F64", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
    data += raw
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open("tiny_bert.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + data)
