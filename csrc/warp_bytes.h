// uint8 images on x86-64: warp_cpu.cpp's forward_images once more, written by hand for registers of MINTER_LANES 32-bit
// numbers. Included by warp_cpu.cpp, once for AVX-512 (16 lanes) and once for AVX2 (8); MINTER_TARGET is the attribute.
//
// The result is that of forward_images to the last bit: the same products and sums, of numbers that are the same but for
// powers of two. What differs is how the taps are brought: a record of 8 bytes for each pixel of the frame holds the
// pixel's three channels and those of the pixel below, so that one load of 16 bytes brings all four taps of a point; the
// registers of several points, transposed, are then one register for each channel, with the four taps of a point as the
// four bytes of a lane. Columns are blended in integers, by multiplication of 16-bit words, and rows in float32.
//
// Where a step waits for the one before it, it is done for several registers in turn (EACH): a processor looks only some
// hundred instructions ahead, and would otherwise find none that is ready.

#if MINTER_LANES == 16
namespace avx512 {
#else
namespace avx2 {
#endif

#define LOCAL MINTER_TARGET ALWAYS_INLINE
#define EACH(count) _Pragma("GCC unroll 8") for (int j = 0; j < (count); ++j)

constexpr int kWide = MINTER_LANES;
typedef float Floats __attribute__((vector_size(4 * MINTER_LANES), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * MINTER_LANES), may_alias));
typedef uint16_t Words __attribute__((vector_size(4 * MINTER_LANES), may_alias));

// ------------------------------------------------------------------------------------------------ where the two differ

#if MINTER_LANES == 16

LOCAL Floats all(float value) { return _mm512_set1_ps(value); }
LOCAL Ints all(int32_t value) { return (Ints)_mm512_set1_epi32(value); }
LOCAL Floats load(const float* from) { return _mm512_loadu_ps(from); }
LOCAL Ints load(const int32_t* from) { return (Ints)_mm512_loadu_si512(from); }
LOCAL void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
LOCAL void store(int32_t* to, Ints value) { _mm512_storeu_si512(to, (__m512i)value); }
LOCAL Ints nearest(Floats value) { return (Ints)_mm512_cvtps_epi32(value); }
LOCAL Ints truncated(Floats value) { return (Ints)_mm512_cvttps_epi32(value); }
LOCAL Floats floats(Ints value) { return _mm512_cvtepi32_ps((__m512i)value); }
LOCAL Floats magnitude(Floats value) { return _mm512_abs_ps(value); }
LOCAL Floats smaller(Floats a, Floats b) { return _mm512_range_ps(a, b, 0b1010); }  // of the magnitudes
LOCAL bool any_below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }
LOCAL Ints blend_columns(Words taps, Ints weights) { return (Ints)_mm512_madd_epi16((__m512i)taps, (__m512i)weights); }
LOCAL void store_bytes(uint8_t* to, Ints value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)value));
}
LOCAL void store_words(uint16_t* to, Ints value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)value));
}

// A lane of 128 bits for each channel: 16 neighbouring pixels of the frame.
struct Pixels { __m512i channels; };

template <int kChannels>
LOCAL Pixels load_pixels(const uint8_t* from, int64_t stride_c, __m128i order) {
  const auto load = [](const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  __m512i channels = _mm512_castsi128_si512(load(from));
  if constexpr (kChannels > 1) channels = _mm512_inserti32x4(channels, load(from + stride_c), 1);
  if constexpr (kChannels > 2) channels = _mm512_inserti32x4(channels, load(from + 2 * stride_c), 2);
  return {_mm512_shuffle_epi8(channels, _mm512_broadcast_i32x4(order))};
}

// 16 records: of each channel the pixel and the one below it, as two neighbouring bytes.
LOCAL void store_records(uint64_t* to, Pixels upper, Pixels lower) {
  const __m512i by_pixel = _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4, 27, 19, 11, 3,
                                            26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
  const __m512i first = _mm512_unpacklo_epi8(upper.channels, lower.channels);
  const __m512i second = _mm512_unpackhi_epi8(upper.channels, lower.channels);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(by_pixel, first));
  _mm512_storeu_si512(to + 8, _mm512_permutexvar_epi16(by_pixel, second));
}

// The taps of points j, j + 4, j + 8, ...: for each its record and the one right of it.
LOCAL Ints load_points(const uint64_t* records, const int32_t* at, int j) {
  const auto load = [](const uint64_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
  __m512i points = _mm512_castsi128_si512(load(records + at[j]));
  points = _mm512_inserti32x4(points, load(records + at[j + 4]), 1);
  points = _mm512_inserti32x4(points, load(records + at[j + 8]), 2);
  return (Ints)_mm512_inserti32x4(points, load(records + at[j + 12]), 3);
}

// In a register, and not read again from where it came from.
LOCAL Floats kept(Floats value) {
  asm("" : "+v"(value));
  return value;
}

#define SHUFFLE_BYTES(a, order) (Ints) _mm512_shuffle_epi8((__m512i)(a), _mm512_broadcast_i32x4(order))
#define UNPACK(which, a, b) (Ints) _mm512_unpack##which((__m512i)(a), (__m512i)(b))

#else

LOCAL Floats all(float value) { return _mm256_set1_ps(value); }
LOCAL Ints all(int32_t value) { return (Ints)_mm256_set1_epi32(value); }
LOCAL Floats load(const float* from) { return _mm256_loadu_ps(from); }
LOCAL Ints load(const int32_t* from) { return (Ints)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
LOCAL void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
LOCAL void store(int32_t* to, Ints value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)value); }
LOCAL Ints nearest(Floats value) { return (Ints)_mm256_cvtps_epi32(value); }
LOCAL Ints truncated(Floats value) { return (Ints)_mm256_cvttps_epi32(value); }
LOCAL Floats floats(Ints value) { return _mm256_cvtepi32_ps((__m256i)value); }
LOCAL Floats magnitude(Floats value) { return (Floats)((Ints)value & 0x7fffffff); }
LOCAL Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, magnitude(b)); }
LOCAL bool any_below(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0; }
LOCAL Ints blend_columns(Words taps, Ints weights) { return (Ints)_mm256_madd_epi16((__m256i)taps, (__m256i)weights); }
LOCAL __m128i words_of(Ints value) {
  const __m256i words = _mm256_packus_epi32((__m256i)value, (__m256i)value);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0b1000));
}
LOCAL void store_bytes(uint8_t* to, Ints value) {
  const __m128i words = words_of(value);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}
LOCAL void store_words(uint16_t* to, Ints value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words_of(value));
}

// 16 neighbouring pixels of the frame, each channel in 16-bit words.
struct Pixels { __m256i channels[3]; };

template <int kChannels>
LOCAL Pixels load_pixels(const uint8_t* from, int64_t stride_c, __m128i order) {
  Pixels pixels{{_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()}};
  for (int c = 0; c < kChannels; ++c) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c * stride_c));
    pixels.channels[c] = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(bytes, order));
  }
  return pixels;
}

LOCAL void store_records(uint64_t* to, Pixels upper, Pixels lower) {
  const __m256i none = _mm256_setzero_si256();
  __m256i pairs[3];
  for (int c = 0; c < 3; ++c) pairs[c] = _mm256_or_si256(upper.channels[c], _mm256_slli_epi16(lower.channels[c], 8));
  const __m256i first = _mm256_unpacklo_epi16(pairs[0], pairs[1]), first_third = _mm256_unpacklo_epi16(pairs[2], none);
  const __m256i second = _mm256_unpackhi_epi16(pairs[0], pairs[1]), second_third = _mm256_unpackhi_epi16(pairs[2], none);
  const __m256i twos[4] = {_mm256_unpacklo_epi32(first, first_third), _mm256_unpackhi_epi32(first, first_third),
                           _mm256_unpacklo_epi32(second, second_third), _mm256_unpackhi_epi32(second, second_third)};
  for (int i = 0; i < 2; ++i) {  // pixels 4 i and 4 i + 8 on
    const __m256i low = _mm256_permute2x128_si256(twos[2 * i], twos[2 * i + 1], 0x20);
    const __m256i high = _mm256_permute2x128_si256(twos[2 * i], twos[2 * i + 1], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * i), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * i + 8), high);
  }
}

LOCAL Ints load_points(const uint64_t* records, const int32_t* at, int j) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(records + at[j]));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(records + at[j + 4]));
  return (Ints)_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
}

LOCAL Floats kept(Floats value) { return value; }  // 16 registers are too few for that

#define SHUFFLE_BYTES(a, order) (Ints) _mm256_shuffle_epi8((__m256i)(a), _mm256_broadcastsi128_si256(order))
#define UNPACK(which, a, b) (Ints) _mm256_unpack##which((__m256i)(a), (__m256i)(b))

#endif

// ---------------------------------------------------------------------------------------------------------------- steps

// 16 pixels of a source row, black where there is none.
template <int kChannels>
LOCAL Pixels load_row(const Warp& w, const uint8_t* from, int64_t row, const __m128i (&orders)[2]) {
  const bool within = row >= 0 && row < w.height;
  return load_pixels<kChannels>(from + (within ? row : 0) * w.stride_h, w.stride_c, orders[within]);
}

// The records of one plane (up to three channels, from `image`) of a view that is not empty.
template <int kChannels>
LOCAL void fill_records(const Warp& w, const View& view, const uint8_t* image, int64_t pitch, uint64_t* records) {
  const int64_t rows = view.bottom - view.top, columns = view.end - view.left;
  const Columns c = source_columns(w, view);
  __m128i orders[2] = {_mm_set1_epi8(-1)};
  for (int64_t x = 0; x < columns; x += 16) {
    // Which of 16 bytes of a source row, read from where all that is wanted of them lies within it, each pixel is.
    const int64_t begin = std::max(c.first, x), past = std::min(c.past, x + 16);
    const int64_t lowest = c.origin + c.step * (c.step > 0 ? begin : past - 1);
    const int64_t from = begin < past ? std::min(lowest, w.width - 16) : 0;
    const __m128i i = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m128i first = _mm_set1_epi8(static_cast<int8_t>(begin < past ? c.origin + c.step * x - from : 0));
    const __m128i place = c.step > 0 ? _mm_add_epi8(first, i) : _mm_sub_epi8(first, i);
    const __m128i below = _mm_cmplt_epi8(i, _mm_set1_epi8(static_cast<int8_t>(std::min<int64_t>(begin - x, 16))));
    const __m128i beyond = _mm_cmpgt_epi8(i, _mm_set1_epi8(static_cast<int8_t>(std::max<int64_t>(past - x, 0) - 1)));
    orders[1] = _mm_or_si128(place, _mm_or_si128(below, beyond));  // -1: black
    uint64_t* to = records + 1 + x;
    Pixels above = load_row<kChannels>(w, image + from, view.top + view.down, orders);
    store_records(to, above, above);
    for (int64_t y = 1; y < rows; ++y) {
      to += pitch;
      const Pixels pixels = load_row<kChannels>(w, image + from, view.top + view.down + y, orders);
      store_records(to, above, pixels);
      above = pixels;
    }
    store_records(to + pitch, above, above);
  }
  for (int64_t y = 0; y <= rows; ++y) {  // afterwards: to read what was just written would wait for it
    uint64_t* row = records + y * pitch;
    row[0] = row[1], row[columns + 1] = row[columns];
  }
}

// forward_images' locate, for `rows` whole rows from `row` on: how far the nearest of the points is from the border is
// compared with the doubt at the end.
LOCAL bool locate(const CentredMap& m, const ByteGroups& groups, const ByteTerms& terms, int64_t pitch, int64_t row,
                  int64_t rows, ByteBlock& block) {
  constexpr int kTogether = ByteGroups::kTogether;
  constexpr float one = kByteOne;  // columns are counted in parts of a pixel, so many to one
  const Floats half_u = all(m.half_u * one), half_v = all(m.half_v);
  const Floats to_column = all((m.half_u + 0.5f) * one), to_row = all(m.half_v + 0.5f);
  Floats least_u = all(std::numeric_limits<float>::infinity()), least_v = least_u;
  const int count = static_cast<int>(rows) * groups.in_row;
  for (int g = 0; g < count; g += kTogether) {
    Floats u[kTogether], v[kTogether], inverse[kTogether], past_u[kTogether], past_v[kTogether];
    Ints within[kTogether], column[kTogether], top[kTogether], fraction[kTogether];
    int64_t to[kTogether];
    EACH(kTogether) {
      const ByteGroups::Group& group = groups.all[g + j];
      const int64_t x = group.column, y = row + group.row;
      to[j] = group.first;
      inverse[j] = load(terms.column[0] + x) + all(terms.row[0][y]);
      u[j] = load(terms.column[1] + x) + all(terms.row[1][y]);
      v[j] = load(terms.column[2] + x) + all(terms.row[2][y]);
    }
    EACH(kTogether) inverse[j] = all(1.0f) / inverse[j];
    EACH(kTogether) u[j] *= inverse[j];
    EACH(kTogether) v[j] *= inverse[j];
    EACH(kTogether) past_u[j] = magnitude(u[j]) - half_u;
    EACH(kTogether) past_v[j] = magnitude(v[j]) - half_v;
    EACH(kTogether) least_u = smaller(least_u, past_u[j]);
    EACH(kTogether) least_v = smaller(least_v, past_v[j]);
    EACH(kTogether) within[j] = ((Ints)past_u[j] & (Ints)past_v[j]) >> 31;  // all bits where both are negative
    EACH(kTogether) u[j] += to_column;
    EACH(kTogether) v[j] += to_row;
    EACH(kTogether) column[j] = nearest(u[j]) & within[j];
    EACH(kTogether) v[j] = (Floats)((Ints)v[j] & within[j]);
    EACH(kTogether) top[j] = truncated(v[j]);
    EACH(kTogether) fraction[j] = column[j] & all(kByteOne - 1);
    EACH(kTogether) column[j] = column[j] >> kByteBits;
    EACH(kTogether) v[j] -= floats(top[j]);
    EACH(kTogether) top[j] = top[j] * all(static_cast<int32_t>(pitch)) + column[j];
    EACH(kTogether) fraction[j] = (fraction[j] * all(static_cast<int32_t>(0xffff0001))) | all(kByteOne);
    EACH(kTogether) fraction[j] &= within[j];
    EACH(kTogether) store(block.at + to[j], top[j]);
    EACH(kTogether) store(block.fy + to[j], v[j]);
    EACH(kTogether) store(block.weights + to[j], fraction[j]);
  }
  return any_below(least_u, all(m.doubt_u * one)) || any_below(least_v, all(m.doubt_v));
}

// The same where float32 cannot tell.
LOCAL void locate_exactly(const Coefficients& k, const View& view, int64_t width, int64_t pitch, int64_t row,
                          int64_t rows, ByteBlock& block) {
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const Point point = source_point(k, row + y, x);
      const bool within = inside(view, point);
      const double column = within ? point.u - view.left + 0.5 : 0.0, line = within ? point.v - view.top + 0.5 : 0.0;
      const int32_t left = static_cast<int32_t>(column), top = static_cast<int32_t>(line);
      const auto fx = static_cast<int32_t>(byte_fraction(static_cast<float>(column - left)) * kByteOne);
      const int32_t fraction = fx & (kByteOne - 1);  // 0 where it was rounded to 1: of the next pixel
      block.at[y * width + x] = top * static_cast<int32_t>(pitch) + left + (fx >> kByteBits);
      block.weights[y * width + x] = within ? (fraction * static_cast<int32_t>(0xffff0001)) | kByteOne : 0;
      block.fy[y * width + x] = static_cast<float>(line - top);
    }
  }
}

// The four taps of kWide points, whose records are `at`: a register for each channel.
LOCAL void gather(const uint64_t* records, const int32_t* at, Ints (&taps)[3]) {
  const __m128i by_channel = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  Ints points[4];
  EACH(4) points[j] = load_points(records, at, j);
  EACH(4) points[j] = SHUFFLE_BYTES(points[j], by_channel);
  const Ints first = UNPACK(lo_epi32, points[0], points[1]), second = UNPACK(lo_epi32, points[2], points[3]);
  const Ints third = UNPACK(hi_epi32, points[0], points[1]), fourth = UNPACK(hi_epi32, points[2], points[3]);
  taps[0] = UNPACK(lo_epi64, first, second), taps[1] = UNPACK(hi_epi64, first, second);
  taps[2] = UNPACK(lo_epi64, third, fourth);
}

// kChannels outputs, those of one plane, for points begin to end of a block. The taps are gathered one turn ahead. What
// will be written `ahead` elements further on is fetched: a store to a line that is not in the cache has to wait for it.
template <int kChannels, typename Out, typename Stored>
LOCAL void interpolate(const ByteBlock& block, const uint64_t* records, const ByteChannel* channels, int begin, int end,
                       Stored* const (&to)[3], int64_t ahead) {
  const uint64_t* from = apart(records);
  Floats scale[kChannels], offset[kChannels], fill[kChannels];
  EACH(kChannels) scale[j] = kept(all(channels[j].scale));
  EACH(kChannels) offset[j] = kept(all(channels[j].offset));
  EACH(kChannels) fill[j] = kept(all(channels[j].fill));
  Ints taps[3], next[3], blended[2][3];
  Floats upper[3], lower[3];
  gather(from, block.at + begin, taps);
  for (int i = begin; i < end; i += kWide) {
    gather(from, block.at + i + kWide, next);
    if constexpr (sizeof(Stored) > 1) EACH(kChannels) __builtin_prefetch(to[j] + i - begin + ahead, 1);
    const Ints weights = load(block.weights + i), within = weights != 0;
    const Floats fy = kept(load(block.fy + i));
    EACH(kChannels) blended[1][j] = blend_columns((Words)taps[j] >> 8, weights);
    EACH(kChannels) blended[0][j] = blend_columns((Words)taps[j] & 0xff, weights);
    EACH(kChannels) lower[j] = floats(blended[1][j]);
    EACH(kChannels) upper[j] = floats(blended[0][j]);
    EACH(kChannels) lower[j] -= upper[j];
    EACH(kChannels) lower[j] *= fy;
    EACH(kChannels) upper[j] += lower[j];
    EACH(kChannels) upper[j] *= scale[j];
    if constexpr (!std::is_same_v<Out, uint8_t>) EACH(kChannels) upper[j] += offset[j];
    EACH(kChannels) upper[j] = within ? upper[j] : fill[j];
    if constexpr (std::is_same_v<Out, float>) {
      EACH(kChannels) store(to[j] + i - begin, upper[j]);
    } else if constexpr (std::is_same_v<Out, uint8_t>) {
      EACH(kChannels) store_bytes(to[j] + i - begin, nearest(upper[j]));
    } else {
      Ints bits[3], odd[3];
      EACH(kChannels) bits[j] = (Ints)upper[j];
      EACH(kChannels) odd[j] = (bits[j] >> 16) & all(1);
      EACH(kChannels) bits[j] += all(0x7fff);
      EACH(kChannels) bits[j] += odd[j];
      EACH(kChannels) bits[j] = (bits[j] >> 16) & all(0xffff);
      EACH(kChannels) store_words(to[j] + i - begin, bits[j]);
    }
    EACH(3) taps[j] = next[j];
  }
}

// The same for a whole block; of its last points, where they do not fill a register, only those that are wanted.
template <int kChannels, typename Out, typename Stored>
LOCAL void interpolate_block(const ByteBlock& block, const uint64_t* records, const ByteChannel* channels, int wanted,
                             Stored* output, int64_t pixels, int64_t ahead) {
  const int whole = wanted / kWide * kWide;
  Stored* to[3];
  for (int c = 0; c < kChannels; ++c) to[c] = output + c * pixels;
  interpolate<kChannels, Out>(block, records, channels, 0, whole, to, ahead);
  if (whole == wanted) return;
  alignas(64) Stored rest[3][kWide];
  Stored* const aside[3] = {rest[0], rest[1], rest[2]};
  interpolate<kChannels, Out>(block, records, channels, whole, wanted, aside, 0);
  for (int c = 0; c < kChannels; ++c) std::memcpy(to[c] + whole, rest[c], (wanted - whole) * sizeof(Stored));
}

// The parts of the points that depend on the column alone and on the row alone.
LOCAL void make_terms(const Warp& w, const CentredMap& map, ByteTerms& terms) {
  for (int64_t x = 0; x < w.width; x += kWide) {
    const Floats centre = load(terms.x + x);
    store(terms.column[0] + x, all(map.g) * centre);
    store(terms.column[1] + x, all(map.au * kByteOne) * centre);
    store(terms.column[2] + x, all(map.av) * centre);
  }
  for (int64_t y = 0; y < w.height + ByteGroups::kTogether; y += kWide) {  // those beyond the last are as the last
    const Floats centre = load(terms.y + y);
    store(terms.row[0] + y, all(map.h) * centre + all(map.w));
    store(terms.row[1] + y, all(map.bu * kByteOne) * centre + all(map.cu * kByteOne));
    store(terms.row[2] + y, all(map.bv) * centre + all(map.cv));
  }
}

template <typename Out>
MINTER_TARGET void forward_bytes(const Warp& w, int64_t begin, int64_t end, void* outputs) {
  const int64_t pixels = w.height * w.width, planes = (w.channels + 2) / 3;
  const int64_t rows_together = std::min<int64_t>(w.height, kBlock / w.width);
  using Stored = decltype(converted<Out>(0.0f));
  const bool small = w.channels * pixels * sizeof(Stored) <= 65536;  // then the same place of the next image is fetched
  const int64_t ahead = small ? w.channels * pixels : kBlock;
  const ByteGroups groups(w, rows_together, kWide);
  const std::vector<ByteChannel> channels = byte_channels<Out>(w);
  ByteFrame frame(w, planes);
  ByteTerms terms(w);
  ByteBlock block;
  for (int64_t n = begin; n < end; ++n) {
    const Coefficients coefficients = load_coefficients(w, n);
    const View view = load_view(w, n);
    const CentredMap map = centre(coefficients, view, w.height, w.width);
    for (int64_t p = 0; p < planes && view.top < view.bottom && view.left < view.end; ++p) {
      const uint8_t* image = static_cast<const uint8_t*>(w.images) + view.image * w.stride_n + 3 * p * w.stride_c;
      const int64_t left = w.channels - 3 * p;
      if (left == 1) {
        fill_records<1>(w, view, image, frame.pitch, frame.plane(p));
      } else if (left == 2) {
        fill_records<2>(w, view, image, frame.pitch, frame.plane(p));
      } else {
        fill_records<3>(w, view, image, frame.pitch, frame.plane(p));
      }
    }
    if (n + 1 < end) prefetch<uint8_t>(w, n + 1);
    make_terms(w, map, terms);
    Stored* output = static_cast<Stored*>(outputs) + n * w.channels * pixels;
    for (int64_t y = 0; y < w.height; y += rows_together, output += rows_together * w.width) {
      const int64_t rows = std::min(rows_together, w.height - y);
      const int wanted = static_cast<int>(rows * w.width);
      if (map.exact || locate(map, groups, terms, frame.pitch, y, rows, block)) {
        locate_exactly(coefficients, view, w.width, frame.pitch, y, rows, block);
      }
      // What is gathered ahead, or fills the last register.
      for (int i = wanted; i < wanted + 2 * kWide; ++i) block.at[i] = 0, block.weights[i] = 0;
      for (int64_t p = 0; p < planes; ++p) {
        const ByteChannel* of_plane = channels.data() + 3 * p;
        const int64_t left = w.channels - 3 * p;
        if (left == 1) {
          interpolate_block<1, Out>(block, frame.plane(p), of_plane, wanted, output + 3 * p * pixels, pixels, ahead);
        } else if (left == 2) {
          interpolate_block<2, Out>(block, frame.plane(p), of_plane, wanted, output + 3 * p * pixels, pixels, ahead);
        } else {
          interpolate_block<3, Out>(block, frame.plane(p), of_plane, wanted, output + 3 * p * pixels, pixels, ahead);
        }
      }
    }
  }
}

#undef LOCAL
#undef EACH
#undef SHUFFLE_BYTES
#undef UNPACK
}  // namespace avx512 or avx2
