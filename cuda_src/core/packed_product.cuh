// Which way packed weights are multiplied: the choice between packed_rows.cuh (up to 16 rows of x),
// packed_batch.cuh (up to 64), packed_wgmma.cuh (9 to 64 on Hopper, of the formats and sizes that it takes) and
// packed_stream.cuh (float32, and on a CPU).
//
// They are classes with the same functions, so that an op has one kernel for packed weights:
//
//   P product(PackedProduct<T>);            where the weights and x are
//   product.start();                        first loads, and the wait for the preceding kernel
//   for (; product.more(); product.next())  the block's sets of outputs
//     product.multiply();
//     product.each_output([&](int output, int b, float sum, float second) { ... });
#pragma once
#include "packed_batch.cuh"
#include "packed_rows.cuh"
#include "packed_stream.cuh"
#include "packed_wgmma.cuh"

namespace lab {

// How to launch a kernel that is made of P.
template <typename P_>
struct PackedLaunch {
  using P = P_;
  dim3 grid;
  size_t smem_bytes;
  unsigned cluster = 1;
  int tile_batch = 0;  // rows of x in a tile, where the product reads tiles

  // Launches kernel(product, args...), and before it the one that lays x out in tiles.
  template <typename... Params, typename... Args>
  void start(Ptr stream, const char* name, void (*kernel)(Params...),
             const PackedProduct<typename P::T>& product, Args... args) const {
    if constexpr (sizeof(typename P::T) == 2) {
      if (tile_batch) {
        if (!product.tiled) throw std::invalid_argument("more than 8 rows and packed weights need `tiled`");
        tile_rows(product.x, product.tiled, product.rows, tile_batch, product.k, stream);
      }
    }
    launch({grid, dim3(P::kThreads), smem_bytes, stream, true, cluster}, name, kernel, product, args...);
  }
};

template <typename T>
PackedProduct<T> packed_product(Ptr x, Ptr tiled, const Weights& w, int rows, int n, int k) {
  return {as<const T>(x),
          as<T>(tiled),
          {as<const uint8_t>(w.data), as<const uint8_t>(w.scales), w.format},
          rows,
          n,
          k};
}

// Calls f(product, b0) for as many rows of x at a time as a launch takes, from row b0 on.
template <typename T, typename Use>
inline void by_packed_rows(const PackedProduct<T>& all, Use&& use) {
  const int most = sizeof(T) == 2 && !cpu_shapes() ? kMostPackedRows : all.rows;
  for (int b0 = 0; b0 < all.rows; b0 += most) {
    PackedProduct<T> some = all;
    some.x += size_t(b0) * all.k;
    some.rows = min(most, all.rows - b0);
    use(some, b0);
  }
}

template <typename T, int B, int L, int Threads, int Parts>
PackedLaunch<PackedStream<T, PackedStreamShape<B, L, Threads, Parts>>> packed_stream_launch(int n) {
  return {dim3(ceil_div(n, PackedStreamShape<B, L, Threads, Parts>::kOutputsPerBlock)), 0};
}

template <typename T, typename F, int Tiles, int Parts>
PackedLaunch<PackedWgmma<T, F, PackedWgmmaShape<F, Tiles, Parts>>> packed_wgmma_launch(
    const PackedProduct<T>& p) {
  using C = PackedWgmmaShape<F, Tiles, Parts>;
  const unsigned cluster = batch_cluster<C>(p.n, p.k);
  return {dim3(ceil_div(p.n, C::kOutputs) * cluster), sizeof(typename C::template Smem<T>), cluster,
          C::kBatch};
}

// Calls f(PackedLaunch<P>) with the way that fits: `using P = typename decltype(how)::P;`. n: outputs, each of
// Parts rows of w. Throws std::invalid_argument for a format that is not known.
template <typename T, int Parts, typename Use>
inline void by_packed(const PackedProduct<T>& p, Use&& use) {
  if (!known_format(p.w.format)) {
    throw std::invalid_argument("unknown weight format " + std::to_string(p.w.format));
  }
  if constexpr (kHost) {
    if (cpu_shapes()) {
      return p.rows == 1 ? use(packed_stream_launch<T, 1, 1, 8, Parts>(p.n))
                         : use(packed_stream_launch<T, 4, 1, 8, Parts>(p.n));
    }
  }
  if constexpr (!kHasGpuShapes) {
    throw std::logic_error(kNoGpuShapes);
  } else if constexpr (sizeof(T) == 4) {
    use(packed_stream_launch<T, 2, 32, 128, Parts>(p.n));
  } else {
    by_format(p.w.format, [&](auto format) {
      using F = decltype(format);
      if constexpr (kWholeSegments<F>) {
        if (p.n % 8 == 0 && p.k % 8 == 0 && has_wgmma()) {
          if (p.rows > kFewRows) return use(packed_wgmma_launch<T, F, 8, Parts>(p));
          if (p.rows > 8) return use(packed_wgmma_launch<T, F, 2, Parts>(p));
        }
      }
      if (p.rows <= kFewRows) {
        return by_packed_shape<F, Parts>(p.rows, [&](auto shape) {
          using C = decltype(shape);
          using P = PackedRows<T, F, C>;
          use(PackedLaunch<P>{dim3(packed_blocks<C>(p.n)), packed_smem_bytes<T, F, C>(p.rows, p.k)});
        });
      }
      using C = PackedBatchShape<Parts>;
      const unsigned cluster = batch_cluster<C>(p.n, p.k);
      use(PackedLaunch<PackedBatch<T, F, C>>{dim3(ceil_div(p.n, C::kOutputs) * cluster),
                                             sizeof(PackedBatchSmem<T, C>), cluster});
    });
  }
}

}  // namespace lab
