"""`Attention`, the counterpart of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.attention import attention
from tilewright.kernels.autocast import lowers
from tilewright.kernels.checks import check_same
from tilewright.kernels.nn.checks import check_size, check_width, refuse
from tilewright.kernels.rotary import rotary


class Attention(torch.nn.Module):
    """``torch.nn.MultiheadAttention`` by `attention`: projections, attention, projection.

    The state dict has the keys and, without `kv_heads`, the shapes of the counterpart's: in_proj_weight (or, where
    kdim or vdim differs from embed_dim, q_proj_weight, k_proj_weight and v_proj_weight), in_proj_bias,
    out_proj.weight, out_proj.bias. With fewer `kv_heads` the rows of k and v in them are fewer.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as there.
        dropout: not supported; must be 0.0.
        add_bias_kv, add_zero_attn: not supported; must be False. What they are for, `sinks` does.
        kv_heads: heads of k and v, a divisor of num_heads (grouped-query attention); num_heads if None.
        scale, window, softcap: as in `attention`.
        sinks: learn one logit a head that every softmax includes; adds the key ``sinks`` (num_heads,), 0 at first.

    Raises:
        ValueError: an argument is not supported, or the heads do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kv_heads: int | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        refuse("Attention", "dropout", dropout, 0.0, "the kernels drop nothing")
        refuse("Attention", "add_bias_kv", add_bias_kv, False, "see sinks")
        refuse("Attention", "add_zero_attn", add_zero_attn, False, "see sinks")
        widths = {"kdim": embed_dim if kdim is None else kdim, "vdim": embed_dim if vdim is None else vdim}
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kv_heads": kv_heads, **widths}
        for name, size in sizes.items():
            check_size("Attention", name, size)
        if embed_dim % num_heads:
            raise ValueError(f"Attention: num_heads is {num_heads}; it must be a divisor of embed_dim, {embed_dim}")
        if num_heads % kv_heads:
            raise ValueError(f"Attention: kv_heads is {kv_heads}; it must be a divisor of num_heads, {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.kv_heads = kv_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = widths["kdim"]
        self.vdim = widths["vdim"]
        self.batch_first = batch_first
        self.scale = scale
        self.window = window
        self.softcap = softcap

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        # Of q, k and v: the rows of their projections.
        self._widths = [embed_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        fused = self.kdim == self.vdim == embed_dim
        self.in_proj_weight = parameter(sum(self._widths), embed_dim) if fused else None
        self.q_proj_weight = None if fused else parameter(self._widths[0], embed_dim)
        self.k_proj_weight = None if fused else parameter(self._widths[1], self.kdim)
        self.v_proj_weight = None if fused else parameter(self._widths[2], self.vdim)
        self.in_proj_bias = parameter(sum(self._widths)) if bias else None
        self.sinks = parameter(num_heads) if sinks else None
        self.out_proj = torch.nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform input projections, zero biases and sinks, as the counterpart's; out_proj.weight is out_proj's
        own to reset."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                torch.nn.init.xavier_uniform_(weight)
        for zero in (self.in_proj_bias, self.out_proj.bias, self.sinks):
            if zero is not None:
                torch.nn.init.zeros_(zero)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        rotary_tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (seq_q, batch, embed_dim), with batch_first (batch, seq_q, embed_dim), or unbatched (seq_q,
                embed_dim); with `cu_seqlens` (total_tokens, embed_dim).
            key: likewise, with seq_k and kdim; query if None.
            value: likewise, with seq_k and vdim; key if None.
            key_padding_mask: not supported; must be None. Packed documents need no padding: see `cu_seqlens`.
            need_weights: not supported; must be False. The weights never exist.
            attn_mask: must be None; beside is_causal it is taken to be the causal mask, as by the counterpart.
            average_attn_weights: of no consequence without need_weights.
            is_causal: hide later keys; aligned at the bottom right where seq_q and seq_k differ.
            rotary_tables: cos and sin, as `rotary_tables` makes them, to turn q and k by; half layout.
            positions: each token's position for them, (batch, seq_q), unbatched (seq_q,), packed (total_tokens,).
            cu_seqlens: (documents + 1,) int32, where each packed document starts, then total_tokens.
            max_seqlen: the longest document, or an upper bound.

        Returns:
            The output, shaped like `query`, and None in place of the weights.

        Raises:
            ValueError: an argument is not supported, or a shape, dtype or device does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        refuse("Attention", "key_padding_mask", key_padding_mask, None, "pack the documents and give cu_seqlens")
        refuse("Attention", "need_weights", need_weights, False, "the weights never exist")
        if not is_causal:
            refuse("Attention", "attn_mask", attn_mask, None, "beside is_causal=True it may be the causal mask")
        self._check_shapes(query, key, value, packed=cu_seqlens is not None)
        unbatched = query.ndim == 2 and cu_seqlens is None
        sequence_first = query.ndim == 3 and not self.batch_first

        def heads(x: torch.Tensor) -> torch.Tensor:
            """(batch, seq, heads, head_dim), or packed (total_tokens, heads, head_dim); a view."""
            x = x.unflatten(-1, (-1, self.head_dim))
            return x[None] if unbatched else x.transpose(0, 1) if sequence_first else x

        q, k, v = (heads(x) for x in self._project(query, key, value))
        if rotary_tables is not None:
            where = positions[None] if positions is not None and unbatched else positions
            q, k = rotary(q, k, *rotary_tables, positions=where)
        out = attention(
            q,
            k,
            v,
            causal=is_causal,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        assert isinstance(out, torch.Tensor)  # without return_lse
        y: torch.Tensor = self.out_proj(out.flatten(-2))
        return (y[0] if unbatched else y.transpose(0, 1) if sequence_first else y), None

    def _check_shapes(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: bool) -> None:
        allowed = "(total_tokens, width) with cu_seqlens" if packed else "of 2 or 3 dimensions"
        for name, x, what in (("query", query, "embed_dim"), ("key", key, "kdim"), ("value", value, "vdim")):
            check_width("Attention", name, x, getattr(self, what), what)
            if x.ndim != query.ndim or x.ndim not in ((2,) if packed else (2, 3)):
                raise ValueError(
                    f"Attention: {name} has shape {tuple(x.shape)}; it must be {allowed}, as many as query"
                )
            weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
            assert weight is not None  # one of the two is there
            check_same("Attention", "in_proj_weight", weight, dtype=not lowers(x.device.type), **{name: x})

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v with their heads side by side."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return torch.split(F.linear(query, weight, bias), self._widths, dim=-1)
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if weight is not None:
            weights = torch.split(weight, self._widths)
        biases: Any = torch.split(bias, self._widths) if bias is not None else (None, None, None)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def extra_repr(self) -> str:
        names = ["embed_dim", "num_heads", "kv_heads", "kdim", "vdim", "batch_first", "scale", "window", "softcap"]
        options = [f"{name}={getattr(self, name)!r}" for name in names]
        return ", ".join([*options, f"bias={self.in_proj_bias is not None}", f"sinks={self.sinks is not None}"])
