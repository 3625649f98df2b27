"""Our attention and norms in a transformers model (pip install transformers kernels): the same tokens."""

import kernels
import torch
import transformers as hf

import lab


class Norm(torch.nn.Module):  # the registry gives this forward to a layer that has weight and epsilon
    def forward(self, hidden_states):
        return torch.ops.lab.rmsnorm(hidden_states, self.weight, self.variance_epsilon)


def attention(module, q, k, v, mask, scaling, position_ids, **more):
    if q.shape[2] > 1:  # the prompt
        return hf.AttentionInterface()["sdpa"](module, q, k, v, mask, scaling=scaling, **more)
    pages = torch.arange(len(q), dtype=torch.int32)[:, None]  # one for each sequence
    lengths = (position_ids[:, 0].int() + 1).expand(len(q)).contiguous()
    return torch.ops.lab.decode_attention(q[:, :, 0], k, v, pages, lengths, scaling)[:, None], None


torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
config = hf.LlamaConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4)
model, prompt, trace = hf.LlamaForCausalLM(config).eval(), torch.arange(1, 8)[None], lab.Trace()
# A static cache of 256 tokens is a paged cache with one page of 256 for each sequence.
tokens = lambda: model.generate(prompt, past_key_values=hf.StaticCache(config, 256), max_new_tokens=20)
before = tokens()
lab.use("cuda", trace=trace)
hf.AttentionInterface.register("lab", attention)
hf.AttentionMaskInterface.register("lab", hf.masking_utils.sdpa_mask)
model.set_attn_implementation("lab")
kernels.replace_kernel_forward_from_hub(type(model.model.norm), "RMSNorm")
ours = type("Ours", (), {"load": lambda self: Norm})()  # a repository is what has load()
with kernels.use_kernel_mapping({"RMSNorm": {model.device.type: ours}}):
    kernels.kernelize(model, mode=kernels.Mode.INFERENCE)
assert torch.equal(tokens(), before)
print("the same tokens, by", trace.rows())
