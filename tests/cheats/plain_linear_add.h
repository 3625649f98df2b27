// What the cheats at linear_add share: they cheat where weights are plain, with one thread for each output. (To
// include linear_add.cu for the rest would take ten times as long to compile.)
#pragma once
#include <cmath>
#include <cstring>

#include "common.cuh"
#include "core/packed_linear.h"
#include "launchers/linear_add.h"
#include "sizes.h"

using namespace lab;

// Launches kernel_of(T) on plain weights; packed ones go to linear's kernel, as they should.
template <typename F>
void add_product(const LinearAddArgs& a, const char* name, F kernel_of) {
  if (a.w.format != 0) {
    LinearArgs product{};
    product.x = a.x, product.tiled = a.tiled, product.w = a.w, product.bias = a.bias, product.y = a.residual;
    product.rows = a.rows, product.n = a.n, product.k = a.k;
    product.dtype = product.out_dtype = a.dtype;
    product.stream = a.stream;
    return packed_linear(product, a.residual);
  }
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch({dim3(blocks_for(int64_t(a.rows) * a.n, 128)), dim3(128), 0, a.stream}, name, kernel_of(tag),
           as<const T>(a.x), as<const T>(a.w.data), as<const T>(a.bias), as<T>(a.residual), a.rows, a.n, a.k);
  });
}
