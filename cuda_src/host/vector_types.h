// CUDA's built-in vector types: float4, uint2, dim3 ... with the sizes and alignments that CUDA gives them.
#pragma once

#define LAB_VECTOR2(name, type, align)       \
  struct alignas(align) name { type x, y; }; \
  inline name make_##name(type x, type y) { return {x, y}; }
#define LAB_VECTOR3(name, type)  \
  struct name { type x, y, z; }; \
  inline name make_##name(type x, type y, type z) { return {x, y, z}; }
#define LAB_VECTOR4(name, type, align)             \
  struct alignas(align) name { type x, y, z, w; }; \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

LAB_VECTOR2(char2, signed char, 2)
LAB_VECTOR2(uchar2, unsigned char, 2)
LAB_VECTOR2(short2, short, 4)
LAB_VECTOR2(ushort2, unsigned short, 4)
LAB_VECTOR2(int2, int, 8)
LAB_VECTOR2(uint2, unsigned, 8)
LAB_VECTOR2(float2, float, 8)
LAB_VECTOR2(longlong2, long long, 16)
LAB_VECTOR2(ulonglong2, unsigned long long, 16)
LAB_VECTOR2(double2, double, 16)
LAB_VECTOR3(int3, int)
LAB_VECTOR3(uint3, unsigned)
LAB_VECTOR3(float3, float)
LAB_VECTOR4(char4, signed char, 4)
LAB_VECTOR4(uchar4, unsigned char, 4)
LAB_VECTOR4(short4, short, 8)
LAB_VECTOR4(ushort4, unsigned short, 8)
LAB_VECTOR4(int4, int, 16)
LAB_VECTOR4(uint4, unsigned, 16)
LAB_VECTOR4(float4, float, 16)

#undef LAB_VECTOR2
#undef LAB_VECTOR3
#undef LAB_VECTOR4

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
