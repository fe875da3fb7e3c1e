"""Models for Hypothesis to draw."""

from hypothesis import settings
from hypothesis import strategies as st

from loracle.placement import Inventory, LinearModule

KINDS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
prove = settings(deadline=None)  # a shared machine has slow moments


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    """Models of up to nine layers, of which each has its own choice of modules and widths."""
    widths = st.integers(1, 40)
    modules = []
    num_layers = draw(st.integers(1, 9))
    for layer in range(num_layers):
        for kind in draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, unique=True)):
            name = f"model.layers.{layer}.{KINDS[kind]}.{kind}"
            role = "attention" if KINDS[kind] == "self_attn" else "feed-forward"
            modules.append(LinearModule(name, kind, layer, draw(widths), draw(widths), role))
    modules.append(LinearModule("lm_head", "lm_head", None, draw(widths), draw(widths), "head"))
    return Inventory(tuple(modules), num_layers, draw(st.integers(1, 10**9)))
