// The decoding ops for CPUs: attention over latents, linear layers of a few rows, and packing.
//
// Two products do most of the work: rows by rows (multiply.h) and weights by rows (weighted_sum.h).
// Both read memory once, in the dtype in which it is kept, and sum in fp32. For rows of codes in
// models of bf16 there are rounded.h and weighted_bytes.h, where the processor allows. In comments
// and shapes: B sequences, T new tokens, H query heads, K latents of keys, L latents of values, S
// slots, R the width of a latent, D the width of a head, G kv heads.
//
// This is the only translation unit. With one unit per op, compiling took 54 s of CPU time instead
// of 22 s (GCC 12, AVX-512), because each unit repeats PyTorch's headers and the two products.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "anchored_decode.h"
#include "latent_decode.h"
#include "lift_heads.h"
#include "linear_decode.h"
#include "pack.h"
#include "rotary_decode.h"
#include "unpack.h"

TORCH_LIBRARY_IMPL(eigenzoo, CPU, m) {
  m.impl("latent_decode", latent_decode);
  m.impl("anchored_decode", anchored_decode);
  m.impl("rotary_decode", rotary_decode);
  m.impl("linear_decode", linear_decode);
  m.impl("lift_heads", lift_heads);
  m.impl("pack", pack);
  m.impl("unpack", unpack_rows);
}

TORCH_LIBRARY_IMPL(eigenzoo, Autograd, m) {  // backward raises an error: there is no gradient
  for (const char* op : {"latent_decode", "anchored_decode", "rotary_decode", "linear_decode",
                         "lift_heads", "pack", "unpack"})
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
}
