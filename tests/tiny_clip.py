"""A small CLIP in PyTorch, under the names of OpenAI's and of open_clip's files."""

import functools
import math

import pytest

torch = pytest.importorskip("torch")

SIZES = (12, 4, (128, 2, 2, 160), (64, 2, 1), 24, 50, 7)  # as `shapes`
ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def shapes(size, patch, vision, text, embedding, vocab_size=49_408, length=77):
    """The tensors of a CLIP under the names of OpenAI and open_clip."""
    (width, *_), (text_width, *_) = vision, text
    found = {
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + (size // patch) ** 2, width),
        "visual.proj": (width, embedding),
        "token_embedding.weight": (vocab_size, text_width),
        "positional_embedding": (length, text_width),
        "text_projection": (text_width, embedding),
        "logit_scale": (),
    }
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text_width}
    linears = {}
    for tower, (c, layers, _, hidden) in {"visual.": vision, "": (*text, 4 * text_width)}.items():
        for i in range(layers):
            layer = f"{tower}transformer.resblocks.{i}"
            norms |= {f"{layer}.ln_1": c, f"{layer}.ln_2": c}
            linears |= {f"{layer}.attn.out_proj": (c, c)}
            linears |= {f"{layer}.mlp.c_fc": (hidden, c), f"{layer}.mlp.c_proj": (c, hidden)}
            found[f"{layer}.attn.in_proj_weight"] = (3 * c, c)
            found[f"{layer}.attn.in_proj_bias"] = (3 * c,)
    for name, shape in (linears | {name: (c,) for name, c in norms.items()}).items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


class Tower(torch.nn.Module):
    """The transformer that OpenAI and open_clip share, with PyTorch's own attention."""

    def __init__(self, width, layers, heads, hidden, activation):
        super().__init__()
        self.resblocks = torch.nn.ModuleList(
            Block(width, heads, hidden, activation) for _ in range(layers)
        )

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Block(torch.nn.Module):
    def __init__(self, width, heads, hidden, activation):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, hidden), "c_proj": torch.nn.Linear(hidden, width)}
        )
        self.activation = activation

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))


class Visual(torch.nn.Module):
    def __init__(self, size, patch, width, layers, heads, hidden, embedding, activation):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.zeros(width))
        num_tokens = 1 + (size // patch) ** 2
        self.positional_embedding = torch.nn.Parameter(torch.zeros(num_tokens, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.transformer = Tower(width, layers, heads, hidden, activation)
        self.proj = torch.nn.Parameter(torch.zeros(width, embedding))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        token = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([token, x], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenCLIP(torch.nn.Module):
    """A CLIP under the names of OpenAI and open_clip."""

    def __init__(self, size, patch, vision, text, embedding, vocab_size, length, activation):
        super().__init__()
        self.visual = Visual(size, patch, *vision, embedding, activation)
        width, layers, heads = text
        self.token_embedding = torch.nn.Embedding(vocab_size, width)
        self.positional_embedding = torch.nn.Parameter(torch.zeros(length, width))
        self.transformer = Tower(width, layers, heads, 4 * width, activation)
        self.ln_final = torch.nn.LayerNorm(width)
        self.text_projection = torch.nn.Parameter(torch.zeros(width, embedding))
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, ids, images):
        mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask))
        pooled = x[torch.arange(len(ids)), ids.argmax(dim=1)]
        unit = functools.partial(torch.nn.functional.normalize, dim=-1)
        return unit(pooled @ self.text_projection), unit(self.visual(images))


def make(activation):
    """A small CLIP whose parameters are all random, and exact in float16."""
    generator = torch.Generator().manual_seed(0)
    model = OpenCLIP(*SIZES, ACTIVATIONS[activation]).eval()
    for name, x in model.named_parameters():
        noise = torch.randn(x.shape, generator=generator)
        is_norm = ".ln_" in f".{name}" and name.endswith("weight")
        noise = 1 + 0.3 * noise if is_norm else noise * (x.shape[-1] if x.ndim > 1 else 10) ** -0.5
        x.data.copy_(noise.half().float())
    return model
