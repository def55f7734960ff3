// The largest latents of every token out of a whole SAE.
//
// A token keeps the keys of its k largest latents so far in a heap, the least of them on top. Soon nearly every block
// of latents holds none that beats it, which one comparison of whole vectors tells. As keys are all different, the
// result does not depend on how latents are shared out.
#include "encode_topk.h"

#include "wide_product.h"

namespace lockin_fast {
namespace {

LOCKIN_FAST_LOCAL uint64_t key_of(float z, int64_t index) {
  const uint32_t bits = z != z ? 0x7fc00000u : bits_from_float(z);
  return static_cast<uint64_t>(bits) << 32 | (kLowWord - static_cast<uint64_t>(index));
}

// Replaces the least of the heap.
LOCKIN_FAST_LOCAL void replace_top(uint64_t* heap, int64_t size, uint64_t key) {
  int64_t i = 0;
  for (int64_t child = 1; child < size; child = 2 * i + 1) {
    if (child + 1 < size && heap[child + 1] < heap[child]) ++child;
    if (key <= heap[child]) break;
    heap[i] = heap[child];
    i = child;
  }
  heap[i] = key;
}

class Keeper {
 public:
  explicit Keeper(const EncodeTopkArgs& args) : args_(args) {
    for (int64_t t = 0; t < args.wide.tokens; ++t) args.floor[t] = -1.0f;
  }

  void begin(int64_t k0, int64_t latents, int64_t) {
    k0_ = k0;
    latents_ = latents;
    gates_.load(args_.wide.encode, k0, latents);
  }

  void tile(const Tile& tile, const int64_t* tokens, int count) {
    for (int r = 0; r < count; ++r) {
      const float floor = args_.floor[tokens[r]];
      float z[kBlock];
      int any = 0;
      for (int64_t k = 0; k < kBlock; ++k) {
        z[k] = gates_.latent(tile.pre[r][k], k);
        any |= !(z[k] <= floor);  // NaN too
      }
      if (any) keep(z, tokens[r]);
    }
  }

  void end() {}

 private:
  void keep(const float* z, int64_t token) {
    uint64_t* heap = args_.kept + token * args_.k;
    float floor = args_.floor[token];
    for (int64_t k = 0; k < latents_; ++k) {
      if (z[k] <= floor) continue;
      const uint64_t key = key_of(z[k], k0_ + k);
      if (key <= heap[0]) continue;  // NaN beside NaN
      replace_top(heap, args_.k, key);
      floor = heap[0] ? float_from_bits(key_bits(heap[0])) : -1.0f;  // below everything until there are k
    }
    args_.floor[token] = floor;
  }

  const EncodeTopkArgs& args_;
  int64_t k0_ = 0, latents_ = 0;
  Gates gates_;
};

template <class T>
void topk(const EncodeTopkArgs& args, int64_t begin, int64_t end, void* packed) {
  Keeper keeper(args);
  wide_products<T>(args.wide, begin, end, packed, keeper);
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

void encode_topk(const EncodeTopkArgs& args, int64_t begin, int64_t end, void* packed) {
  switch (args.wide.encode.dtype) {
    case Dtype::f32: return topk<float>(args, begin, end, packed);
    case Dtype::f16: return topk<f16>(args, begin, end, packed);
    case Dtype::bf16: return topk<bf16>(args, begin, end, packed);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
