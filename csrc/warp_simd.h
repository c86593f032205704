// The forward warp of uint8 and float32 images, in vectors of kLanes 32-bit numbers. warp_cpu.cpp includes this file
// once for each instruction set, into a namespace of its own, with LOCAL as the functions' attributes. All give the
// same bits, but of a NaN: no sum is fused, and what differs are four functions that move or multiply integers.
//
// A source image is first copied into a frame: the window, cropped, its border repeated once around it. No tap then
// needs clamping. A word of the frame is a float, or for uint8 images eight bytes: of each of three channels the pixel
// and the pixel below. One load of 16 bytes brings all taps of a point for uint8, and those of one row for float32. The
// loads of four points, transposed, are vectors with a point in each lane.
//
// uint8 columns are blended in integers, by a fraction rounded to 2^-15: products and sums are exact. Rows, and float32
// images, are blended in float32.

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits32 __attribute__((vector_size(4 * kLanes)));  // without a sign: what overflows is defined
typedef uint16_t Words __attribute__((vector_size(4 * kLanes)));
typedef int64_t Longs __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(4 * kLanes)));
typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));
typedef int32_t HalfInts __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint16_t Words8 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

template <typename Vector>
LOCAL Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename Vector>
LOCAL void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

LOCAL Floats magnitude(Floats value) { return (Floats)((Ints)value & 0x7fffffff); }

// Alternately elements of a and b: of the lower halves of each 16 bytes, or of the upper.
template <bool kUpper, typename Vector, size_t... i>
LOCAL Vector unpack(Vector a, Vector b, std::index_sequence<i...>) {
  constexpr size_t count = sizeof...(i), each = 16 * count / sizeof(Vector), half = kUpper ? each / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (i / each * each + i % each / 2 + half + i % 2 * count)...);
#else
  return __builtin_shuffle(a, b, decltype(a == b){(i / each * each + i % each / 2 + half + i % 2 * count)...});
#endif
}

template <bool kUpper, typename As, typename Vector>
LOCAL Vector unpack(Vector a, Vector b) {
  return (Vector)unpack<kUpper>((As)a, (As)b, std::make_index_sequence<sizeof(As) / sizeof(As{}[0])>());
}

// -------------------------------------------------------------------------------------- where instruction sets differ

typedef uint8_t NarrowBytes __attribute__((vector_size(kLanes)));
typedef uint16_t NarrowWords __attribute__((vector_size(2 * kLanes)));

// load_points: points 0, 4, 8, ... of `at`, 16 bytes from where each is read. add_products: in each lane the sum of two
// products of 16-bit numbers, those of b with a sign. narrow: of each lane, which a type of 8 bits without or of 16
// bits with a sign can hold.
#ifdef MINTER_X86
template <typename Word>
LOCAL __m128i load_point(const Word* from, int32_t at) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
}
#endif

#if MINTER_LANES == 16
template <typename Word>
LOCAL Ints load_points(const Word* from, const int32_t* at) {
  __m512i points = _mm512_castsi128_si512(load_point(from, at[0]));
  points = _mm512_inserti32x4(points, load_point(from, at[4]), 1);
  points = _mm512_inserti32x4(points, load_point(from, at[8]), 2);
  return (Ints)_mm512_inserti32x4(points, load_point(from, at[12]), 3);
}
LOCAL Ints add_products(Words a, Ints b) { return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
LOCAL NarrowBytes narrow(Ints value, uint8_t) { return (NarrowBytes)_mm512_cvtepi32_epi8((__m512i)value); }
LOCAL NarrowWords narrow(Ints value, uint16_t) { return (NarrowWords)_mm512_cvtepi32_epi16((__m512i)value); }
#elif MINTER_LANES == 8
template <typename Word>
LOCAL Ints load_points(const Word* from, const int32_t* at) {
  const __m256i first = _mm256_castsi128_si256(load_point(from, at[0]));
  return (Ints)_mm256_inserti128_si256(first, load_point(from, at[4]), 1);
}
LOCAL Ints add_products(Words a, Ints b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
LOCAL NarrowWords narrow(Ints value, uint16_t) {
  const __m128i upper = _mm256_extracti128_si256((__m256i)value, 1);
  return (NarrowWords)_mm_packs_epi32(_mm256_castsi256_si128((__m256i)value), upper);
}
LOCAL NarrowBytes narrow(Ints value, uint8_t) {
  const __m256i first = _mm256_set1_epi32(0x0c080400), bytes = _mm256_shuffle_epi8((__m256i)value, first);
  const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  return load<NarrowBytes>(&all);
}
#elif defined(MINTER_X86)
template <typename Word>
LOCAL Ints load_points(const Word* from, const int32_t* at) {
  return (Ints)load_point(from, at[0]);
}
LOCAL Ints add_products(Words a, Ints b) { return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b); }
LOCAL NarrowWords narrow(Ints value, uint16_t) {
  const __m128i words = _mm_packs_epi32((__m128i)value, (__m128i)value);
  return load<NarrowWords>(&words);
}
LOCAL NarrowBytes narrow(Ints value, uint8_t) {
  const __m128i bytes = (__m128i)(value & 0xff), words = _mm_packs_epi32(bytes, bytes);
  const __m128i all = _mm_packus_epi16(words, words);
  return load<NarrowBytes>(&all);
}
#else
template <typename Word>
LOCAL Ints load_points(const Word* from, const int32_t* at) {
  return load<Ints>(from + at[0]);
}
LOCAL Ints add_products(Words a, Ints b) {
  return ((Ints)a & 0xffff) * (b << 16 >> 16) + ((Ints)a >> 16 & 0xffff) * (b >> 16);
}
LOCAL NarrowBytes narrow(Ints value, uint8_t) { return __builtin_convertvector(value, NarrowBytes); }
LOCAL NarrowWords narrow(Ints value, uint16_t) { return __builtin_convertvector(value, NarrowWords); }
#endif

// ---------------------------------------------------------------------------------------------------------- the frame

constexpr int64_t kStrip = 16;  // pixels of a uint8 image whose words are made together

// `count` neighbouring pixels of each channel of a row; the rest, and a row beyond the image, are black.
template <int kChannels>
LOCAL void load_strip(const Warp& w, const uint8_t* column, int64_t row, int64_t count, Bytes16 (&strip)[3]) {
  alignas(64) uint8_t pixels[kChannels][kStrip];
  const bool black = row < 0 || row >= w.height, direct = count == kStrip && w.stride_w == 1 && !black;
  const uint8_t* from = direct ? column + row * w.stride_h : pixels[0];
  if (!direct) {
    std::memset(pixels, 0, sizeof pixels);
    for (int64_t i = 0; i < kChannels * count && !black; ++i) {
      const int64_t c = i / count, x = i % count;
      pixels[c][x] = column[row * w.stride_h + c * w.stride_c + x * w.stride_w];
    }
  }
  for (int c = 0; c < kChannels; ++c) strip[c] = load<Bytes16>(from + c * (direct ? w.stride_c : kStrip));
}

template <bool kUpper>
LOCAL void store_eight(uint64_t* to, const Bytes16 (&above)[3], const Bytes16 (&below)[3]) {
  Bytes16 pairs[4] = {};
  for (int c = 0; c < 3; ++c) pairs[c] = unpack<kUpper, Bytes16>(above[c], below[c]);
  const Bytes16 fours[4] = {unpack<false, Words8>(pairs[0], pairs[1]), unpack<false, Words8>(pairs[2], pairs[3]),
                            unpack<true, Words8>(pairs[0], pairs[1]), unpack<true, Words8>(pairs[2], pairs[3])};
  for (int i = 0; i < 2; ++i) {
    const Bytes16 low = unpack<false, Ints4>(fours[2 * i], fours[2 * i + 1]);
    const Bytes16 high = unpack<true, Ints4>(fours[2 * i], fours[2 * i + 1]);
    std::memcpy(to + 4 * i, &low, 16);
    std::memcpy(to + 4 * i + 2, &high, 16);
  }
}

// `columns` words of all rows of a plane. image: at their first column. down: the window's first row in it.
template <int kChannels>
LOCAL void fill_rows(const Warp& w, const uint8_t* image, int64_t down, int64_t rows, int64_t columns, int64_t pitch,
                     uint64_t* words) {
  for (int64_t next = 0; next < columns; next += kStrip) {
    const int64_t x = clamp(next, 0, std::max<int64_t>(0, columns - kStrip));  // the last one whole, in part once more
    const uint8_t* column = image + x * w.stride_w;
    Bytes16 above[3] = {}, below[3] = {};
    load_strip<kChannels>(w, column, down, std::min(kStrip, columns), above);
    for (int64_t y = 0; y <= rows; ++y) {
      load_strip<kChannels>(w, column, down + std::min(y, rows - 1), std::min(kStrip, columns), below);
      store_eight<false>(words + y * pitch + x, above, below);
      store_eight<true>(words + y * pitch + x + 8, above, below);
      std::copy(below, below + 3, above);
    }
  }
}

template <int>
LOCAL void fill_rows(const Warp& w, const float* image, int64_t down, int64_t rows, int64_t columns, int64_t pitch,
                     uint32_t* words) {
  for (int64_t y = 0; y <= rows + 1; ++y, words += pitch) {
    const int64_t row = down + clamp(y - 1, 0, rows - 1);
    if (row < 0 || row >= w.height) {
      std::memset(words, 0, columns * sizeof *words);
    } else if (w.stride_w == 1) {
      std::memcpy(words, image + row * w.stride_h, columns * sizeof *words);
    } else {
      const float* from = image + row * w.stride_h;
      for (int64_t x = 0; x < columns; ++x) words[x] = std::bit_cast<uint32_t>(from[x * w.stride_w]);
    }
  }
}

// One plane of the frame, of a window that is not empty: kChannels channels from `image` on.
template <int kChannels, typename In>
LOCAL void fill_plane(const Warp& w, const View& view, const In* image, int64_t pitch, Word<In>* words) {
  const int64_t rows = view.bottom - view.top, columns = view.end - view.left;
  const int64_t count = rows + (std::is_same_v<In, float> ? 2 : 1);  // of the frame; a row of bytes holds two
  const int64_t origin = source_column(w, view), down = view.top + view.down;
  const int64_t first = clamp(-origin, 0, columns), past = clamp(w.width - origin, first, columns);
  fill_rows<kChannels>(w, image + (origin + first) * w.stride_w, down, rows, past - first, pitch, words + 1 + first);
  for (int64_t y = 0; y < count; ++y) {  // afterwards: to read what was just written would wait for it
    Word<In>* row = words + y * pitch + 1;
    for (int64_t x = 0; x < first; ++x) row[x] = 0;  // black beyond the image
    for (int64_t x = past; x < columns; ++x) row[x] = 0;
    row[-1] = row[0], row[columns] = row[columns - 1];
  }
}

template <typename In>
LOCAL void fill_frame(const Warp& w, const View& view, Frame<In>& frame) {
  for (int64_t p = 0; p < frame.planes && view.top < view.bottom && view.left < view.end; ++p) {
    const int64_t channel = p * kPacked<In>, channels = w.channels - channel;
    const In* image = static_cast<const In*>(w.images) + view.image * w.stride_n + channel * w.stride_c;
    if (kPacked<In> == 1 || channels == 1) {
      fill_plane<1>(w, view, image, frame.pitch, frame.plane(p));
    } else if (channels == 2) {
      fill_plane<2>(w, view, image, frame.pitch, frame.plane(p));
    } else {
      fill_plane<3>(w, view, image, frame.pitch, frame.plane(p));
    }
  }
}

// --------------------------------------------------------------------------------------------------------- the points

// Where the pixels of a block of whole rows are read. The frame is not flipped: column x of a flipped view is column -x
// - 1 there, counted from the last, and the fraction is 1 - fx. Both are exact: a flip changes no bit. False where
// float32 cannot tell of one whether it is inside.
template <bool kFlip>
LOCAL bool locate(const CentredMap& m, const Warp& w, const float* centres, int64_t pitch, int64_t row, int64_t rows,
                  Block& block) {
  const float to_column = m.half_u + 0.5f, to_row = m.half_v + 0.5f;
  const float first_y = 0.5f - 0.5f * static_cast<float>(w.height);
  Floats closest = Floats{} + std::numeric_limits<float>::max();
  for (int64_t r = 0; r < rows; ++r) {
    const float y = first_y + static_cast<float>(row + r);
    const float bu = m.bu * y + m.cu, bv = m.bv * y + m.cv, h = m.h * y + m.w;
    for (int64_t i = 0; i < w.width; i += kLanes) {
      const Floats x = load<Floats>(centres + i), inverse = 1.0f / (m.g * x + h);
      const Floats u = (m.au * x + bu) * inverse, v = (m.av * x + bv) * inverse;
      const Floats past_u = magnitude(u) - m.half_u, past_v = magnitude(v) - m.half_v;
      const Floats past = past_u > past_v ? past_u : past_v, distance = magnitude(past);
      closest = distance < closest ? distance : closest;
      const Ints inside = (Ints)past >> 31;
      const Floats column = (Floats)((Ints)(u + to_column) & inside), line = (Floats)((Ints)(v + to_row) & inside);
      const Ints left = __builtin_convertvector(column, Ints), top = __builtin_convertvector(line, Ints);
      const Floats from_left = column - __builtin_convertvector(left, Floats);
      const Floats fx = kFlip ? 1.0f - from_left : from_left;
      const int64_t to = r * w.width + i;
      store(block.at + to, top * static_cast<int32_t>(pitch) + (kFlip ? ~left : left));
      store(block.fx + to, inside ? fx : kOutside);
      store(block.fy + to, line - __builtin_convertvector(top, Floats));
    }
  }
  float least = closest[0];
  for (int lane = 1; lane < kLanes; ++lane) least = std::min(least, closest[lane]);
  return least >= std::max(m.doubt_u, m.doubt_v);
}

LOCAL HalfFloats beyond(Doubles value, HalfInts whole) {
  return __builtin_convertvector(value - __builtin_convertvector(whole, Doubles), HalfFloats);
}

// The same in float64, as source_point and inside have it, for any part of an image.
LOCAL void locate_exactly(const Coefficients& k, const Warp& w, const View& view, const float* centres, int64_t pitch,
                          int64_t row, int64_t column, int64_t rows, int64_t columns, Block& block) {
  const double left = view.left, end = view.end, top = view.top, bottom = view.bottom;
  for (int64_t r = 0; r < rows; ++r) {
    const double y = static_cast<double>(row + r) + 0.5;
    for (int64_t i = 0; i < columns; i += kLanes / 2) {
      const Doubles x = __builtin_convertvector(load<HalfFloats>(centres + column + i), Doubles) + 0.5 * w.width;
      const Doubles denominator = k.g * x + k.h * y + 1.0;
      const Doubles u = (k.a * x + k.b * y + k.c) / denominator, v = (k.d * x + k.e * y + k.f) / denominator;
      const Longs inside = (u >= left) & (u < end) & (v >= top) & (v < bottom);
      const Doubles to_left = (Doubles)((Longs)(u - left + 0.5) & inside);
      const Doubles to_top = (Doubles)((Longs)(v - top + 0.5) & inside);
      const HalfInts at_left = __builtin_convertvector(to_left, HalfInts);
      const HalfInts at_top = __builtin_convertvector(to_top, HalfInts);
      const HalfFloats fx = beyond(to_left, at_left);
      const HalfInts within = __builtin_convertvector(inside, HalfInts);
      const int64_t to = r * columns + i;
      store(block.at + to, at_top * static_cast<int32_t>(pitch) + (at_left ^ -view.flip));
      store(block.fx + to, within ? (view.flip ? 1.0f - fx : fx) : kOutside);
      store(block.fy + to, beyond(to_top, at_top));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- the blend

// kLanes pixels of each channel of a plane. uint8: -2^15 times as large.
template <int kChannels>
LOCAL void interpolate(const uint64_t* from, int64_t, const int32_t* at, Floats fx, Floats fy,
                       Floats (&values)[kChannels]) {
  Ints p[4];
  for (int j = 0; j < 4; ++j) p[j] = load_points(from, at + j);
  const Ints left01 = unpack<false, Words>(p[0], p[1]), right01 = unpack<true, Words>(p[0], p[1]);
  const Ints left23 = unpack<false, Words>(p[2], p[3]), right23 = unpack<true, Words>(p[2], p[3]);
  const Ints two01 = unpack<false, Words>(left01, right01), third01 = unpack<true, Words>(left01, right01);
  const Ints two23 = unpack<false, Words>(left23, right23), third23 = unpack<true, Words>(left23, right23);
  const Ints taps[3] = {unpack<false, Longs>(two01, two23), unpack<true, Longs>(two01, two23),
                        unpack<false, Longs>(third01, third23)};
  // Beside 2^8 a float32 has 15 bits behind the point: the last 16 bits of the sum are f = 2^15 fx. The weights of left
  // and right are f - 2^15 and -f, in 16 bits with a sign each.
  const Bits32 sum = (Bits32)(fx + 256.0f);
  const Ints weights = (Ints)((sum ^ 0x43808000u) - (sum << 16));
  for (int c = 0; c < kChannels; ++c) {
    const Floats upper = __builtin_convertvector(add_products((Words)taps[c] & 0xff, weights), Floats);
    const Floats lower = __builtin_convertvector(add_products((Words)taps[c] >> 8, weights), Floats);
    values[c] = upper + fy * (lower - upper);
  }
}

template <int kChannels>
LOCAL void interpolate(const uint32_t* from, int64_t pitch, const int32_t* at, Floats fx, Floats fy,
                       Floats (&values)[kChannels]) {
  Floats rows[2], gx = 1.0f - fx;
  for (int i = 0; i < 2; ++i) {
    Ints p[4];
    for (int j = 0; j < 4; ++j) p[j] = load_points(from + i * pitch, at + j);
    const Ints p01 = unpack<false, Ints>(p[0], p[1]), p23 = unpack<false, Ints>(p[2], p[3]);
    const Floats left = (Floats)unpack<false, Longs>(p01, p23), right = (Floats)unpack<true, Longs>(p01, p23);
    rows[i] = left * gx + right * fx;
  }
  values[0] = rows[0] * (1.0f - fy) + rows[1] * fy;
}

// To the bits of the output's type. uint8: of a number beside 2^23, whose last bits are the rounded value.
template <typename In, typename Out>
LOCAL auto converted(Floats value) {
  const Bits32 bits = (Bits32)value;
  if constexpr (std::is_same_v<Out, float>) {
    return value;
  } else if constexpr (std::is_same_v<Out, uint8_t>) {
    return narrow((Ints)bits, uint8_t{});
  } else {
    const Ints rounded = (Ints)(bits + 0x7fffu + ((bits >> 16) & 1u));
    if constexpr (std::is_same_v<In, uint8_t>) return narrow(rounded >> 16, uint16_t{});
    return narrow((value == value ? rounded : 0x7fc00000) >> 16, uint16_t{});
  }
}

// kChannels outputs of points begin to end of a block. What is written `ahead` elements further on is fetched: a store
// to a line that is not in the cache has to wait for it.
template <int kChannels, typename In, typename Out>
LOCAL void blend(const Block& block, const Word<In>* from, int64_t pitch, const Channel* channels, int begin, int end,
                 Bits<Out>* output, int64_t stride, int64_t ahead) {
  asm("" : "+r"(from));  // optimisation barrier: the sum in one register, not added up once more for each tap
  Floats scale[kChannels], offset[kChannels], fill[kChannels];
  for (int c = 0; c < kChannels; ++c) {
    scale[c] = Floats{} + channels[c].scale, offset[c] = Floats{} + channels[c].offset;
    fill[c] = Floats{} + channels[c].fill;
  }
  for (int i = begin; i < end; i += kLanes) {
    const Floats fx = load<Floats>(block.fx + i), fy = load<Floats>(block.fy + i);
    const Ints outside = fx < 0.0f;
    for (int c = 0; c < kChannels && sizeof(Bits<Out>) > 1; ++c) {
      __builtin_prefetch(output + c * stride + i - begin + ahead, 1);
    }
    Floats values[kChannels];
    interpolate<kChannels>(from, pitch, block.at + i, fx, fy, values);
    for (int c = 0; c < kChannels; ++c) {
      const Floats value = values[c] * scale[c] + offset[c];
      store(output + c * stride + i - begin, converted<In, Out>(outside ? fill[c] : value));
    }
  }
}

// The same of a whole block; of its last points, where they do not fill a vector, only those that are wanted.
template <int kChannels, typename In, typename Out>
LOCAL void blend_block(const Block& block, const Word<In>* from, int64_t pitch, const Channel* channels, int count,
                       Bits<Out>* output, int64_t pixels, int64_t ahead) {
  const int whole = count / kLanes * kLanes;
  blend<kChannels, In, Out>(block, from, pitch, channels, 0, whole, output, pixels, ahead);
  if (whole == count) return;
  Bits<Out> rest[kChannels][kLanes];
  blend<kChannels, In, Out>(block, from, pitch, channels, whole, count, rest[0], kLanes, 0);
  for (int c = 0; c < kChannels; ++c) std::copy(rest[c], rest[c] + count - whole, output + c * pixels + whole);
}

template <typename In, typename Out>
TARGET void forward(const Warp& w, int64_t begin, int64_t end, void* outputs) {
  const int64_t pixels = w.height * w.width;
  const int64_t rows_together = std::max<int64_t>(1, kBlock / w.width), columns_together = std::min(kBlock, w.width);
  const int64_t image = w.channels * pixels;
  const int64_t ahead = image * sizeof(Bits<Out>) <= 65536 ? image : kBlock;  // the same place of the next image
  const std::vector<Channel> channels = make_channels<In, Out>(w);
  const std::vector<float> centres = make_centres(w);
  Frame<In> frame(w);
  Block block{};
  for (int64_t n = begin; n < end; ++n) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    const CentredMap map = centre(coefficients, view, w.height, w.width);
    fill_frame(w, view, frame);
    if (n + 1 < end) prefetch<In>(w, n + 1);
    Bits<Out>* output = static_cast<Bits<Out>*>(outputs) + n * w.channels * pixels;
    for (int64_t y = 0; y < w.height; y += rows_together) {
      for (int64_t x = 0; x < w.width; x += columns_together) {
        const int64_t rows = std::min(rows_together, w.height - y), columns = std::min(columns_together, w.width - x);
        const int count = static_cast<int>(rows * columns);
        const float* x0 = centres.data();
        const bool sure = !map.exact && (view.flip ? locate<true>(map, w, x0, frame.pitch, y, rows, block)
                                                   : locate<false>(map, w, x0, frame.pitch, y, rows, block));
        if (!sure) locate_exactly(coefficients, w, view, x0, frame.pitch, y, x, rows, columns, block);
        std::fill(block.at + count, block.at + count + kLanes, 0);  // the rest of the last vector
        for (int64_t p = 0; p < frame.planes; ++p) {
          const int64_t c = p * kPacked<In>, left = w.channels - c;
          const Word<In>* from = frame.plane(p) + (view.flip ? view.end - view.left + 1 : 0);
          Bits<Out>* to = output + c * pixels + y * w.width + x;
          if (kPacked<In> == 1 || left == 1) {
            blend_block<1, In, Out>(block, from, frame.pitch, &channels[c], count, to, pixels, ahead);
          } else if (left == 2) {
            blend_block<2, In, Out>(block, from, frame.pitch, &channels[c], count, to, pixels, ahead);
          } else {
            blend_block<3, In, Out>(block, from, frame.pitch, &channels[c], count, to, pixels, ahead);
          }
        }
      }
    }
  }
}
