// Values in registers, and what instructions of a single thread make of them; by the instructions' names.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

constexpr uint32_t CANONICAL_NAN = 0x7fffffff;  // of every result that is none

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// Bits of a register, or an immediate, as an operand of type T.
template <class T, class Bits> T as(Bits bits) {
    if constexpr (std::is_same_v<T, float>) return bit_cast<float>(uint32_t(bits));
    else if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) return T{uint16_t(bits)};
    else return T(bits);
}
// A result as bits: assigned to a wider register, it is extended by its sign if it has one.
template <class T> auto put(T value) {
    if constexpr (std::is_same_v<T, float>) return std::isnan(value) ? CANONICAL_NAN : bit_cast<uint32_t>(value);
    else if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) return value.bits;
    else return value;
}

inline float to_float(bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
inline float to_float(f16 value) { return float(bit_cast<_Float16>(value.bits)); }
template <class T> T round_to(float value);
template <> inline bf16 round_to<bf16>(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    if (std::isnan(value)) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 round_to<f16>(float value) {
    if (std::isnan(value)) return {0x7fff};
    return {bit_cast<uint16_t>(_Float16(value))};
}
template <class T> uint32_t op_cvt_x2(float high, float low) {
    return uint32_t(round_to<T>(high).bits) << 16 | round_to<T>(low).bits;
}
inline float op_cvt_rna_tf32(float value) {  // ties away from zero; products ignore the bits that are left
    if (!std::isfinite(value)) return value;
    return bit_cast<float>((bit_cast<uint32_t>(value) + 0x1000) & 0xffffe000);
}
template <class To, class From> To op_cvt(From value) {
    constexpr bool is_half = std::is_same_v<From, f16> || std::is_same_v<From, bf16>;
    if constexpr (is_half) return op_cvt<To>(to_float(value));
    else if constexpr (std::is_same_v<To, f16> || std::is_same_v<To, bf16>) return round_to<To>(float(value));
    else if constexpr (std::is_same_v<From, float> && std::is_integral_v<To>) {  // towards zero, within the type
        if (std::isnan(value)) return 0;
        if (value >= float(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
        if (value <= float(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
        return To(value);
    } else return To(value);
}

// ---------------------------------------------------------------------------------------------- instructions, by name

template <class T> struct WideOf;
template <> struct WideOf<int16_t> { using type = int32_t; };
template <> struct WideOf<uint16_t> { using type = uint32_t; };
template <> struct WideOf<int32_t> { using type = int64_t; };
template <> struct WideOf<uint32_t> { using type = uint64_t; };
template <> struct WideOf<int64_t> { using type = __int128; };
template <> struct WideOf<uint64_t> { using type = unsigned __int128; };
template <class T> using Wide = typename WideOf<T>::type;
template <class T> constexpr uint32_t BITS = 8 * sizeof(T);

template <class T> T op_mov(T a) { return a; }
template <class T> T op_add(T a, T b) { return a + b; }
template <class T> T op_sub(T a, T b) { return a - b; }
template <class T> T op_mul(T a, T b) { return a * b; }
template <class T> T op_mad(T a, T b, T c) { return a * b + c; }
template <class T> T op_mul_hi(T a, T b) { return Wide<T>(a) * Wide<T>(b) >> BITS<T>; }
template <class T> Wide<T> op_mul_wide(T a, T b) { return Wide<T>(a) * Wide<T>(b); }
template <class T> Wide<T> op_mad_wide(T a, T b, Wide<T> c) { return Wide<T>(a) * Wide<T>(b) + c; }
template <class T> T op_fma(T a, T b, T c) { return std::fma(a, b, c); }
template <class T> T op_div(T a, T b) {
    if constexpr (std::is_integral_v<T>) return b == 0 ? T(-1) : b == T(-1) && std::is_signed_v<T> ? T(-a) : T(a / b);
    else return a / b;
}
template <class T> T op_rem(T a, T b) { return b == 0 ? a : b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b); }
template <class T> T op_sqrt(T a) { return std::sqrt(a); }
template <class T> T op_rsqrt(T a) { return 1 / std::sqrt(double(a)); }
template <class T> T op_rcp(T a) { return 1 / a; }
template <class T> T op_ex2(T a) { return std::exp2(a); }
template <class T> T op_lg2(T a) { return std::log2(a); }
template <class T> T op_neg(T a) { return -a; }
template <class T> T op_abs(T a) { return a < 0 || (a == 0 && std::is_floating_point_v<T>) ? std::abs(a) : a; }
template <class T> T op_min(T a, T b) {  // of a number and a NaN the number; -0 is below +0
    if constexpr (std::is_floating_point_v<T>) return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
    else return std::min(a, b);
}
template <class T> T op_max(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
    else return std::max(a, b);
}
template <class T> T op_min_NaN(T a, T b) { return std::isnan(a) ? a : std::isnan(b) ? b : op_min(a, b); }
template <class T> T op_max_NaN(T a, T b) { return std::isnan(a) ? a : std::isnan(b) ? b : op_max(a, b); }
template <class T> T op_and(T a, T b) { return a & b; }
template <class T> T op_or(T a, T b) { return a | b; }
template <class T> T op_xor(T a, T b) { return a ^ b; }
template <class T> T op_not(T a) {
    if constexpr (std::is_same_v<T, bool>) return !a;
    else return ~a;
}
template <class T> T op_shl(T a, uint32_t by) { return by < BITS<T> ? T(a << by) : T(0); }
template <class T> T op_shr(T a, uint32_t by) {
    return by < BITS<T> ? T(a >> by) : std::is_signed_v<T> ? T(a >> (BITS<T> - 1)) : T(0);
}
template <class T> T op_selp(T a, T b, bool is_first) { return is_first ? a : b; }
template <class T> uint32_t op_popc(T a) { return __builtin_popcountll(std::make_unsigned_t<T>(a)); }
template <class T> uint32_t op_clz(T a) { return a == 0 ? BITS<T> : __builtin_clzll(a) - (64 - BITS<T>); }
template <class T> T op_bfe(T a, uint32_t from, uint32_t count) {
    from &= 255, count &= 255;
    if (count == 0) return 0;
    uint32_t last = std::min(from + count, BITS<T>) - 1;
    if (from > last) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
    return T(T(a << (BITS<T> - 1 - last)) >> (BITS<T> - 1 - last + from));
}
inline uint32_t byte_of(uint64_t bytes, uint32_t selector) {
    uint32_t byte = bytes >> 8 * (selector & 7) & 255;
    return selector & 8 ? (byte & 128 ? 255 : 0) : byte;
}
template <class T> T op_prmt(T a, T b, T selectors) {
    uint64_t bytes = uint64_t(b) << 32 | a;
    T found = 0;
    for (int i = 0; i < 4; ++i) found |= byte_of(bytes, selectors >> 4 * i & 15) << 8 * i;
    return found;
}

// Comparisons: false if a float is NaN, but for those whose names end in u.
template <class T> bool is_nan(T a) { return a != a; }
template <class T> bool is_eq(T a, T b) { return a == b; }
template <class T> bool is_ne(T a, T b) { return a != b && !is_nan(a) && !is_nan(b); }
template <class T> bool is_lt(T a, T b) { return a < b; }
template <class T> bool is_le(T a, T b) { return a <= b; }
template <class T> bool is_gt(T a, T b) { return a > b; }
template <class T> bool is_ge(T a, T b) { return a >= b; }
template <class T> bool is_equ(T a, T b) { return !is_ne(a, b); }
template <class T> bool is_neu(T a, T b) { return !(a == b); }
template <class T> bool is_ltu(T a, T b) { return !(a >= b); }
template <class T> bool is_leu(T a, T b) { return !(a > b); }
template <class T> bool is_gtu(T a, T b) { return !(a <= b); }
template <class T> bool is_geu(T a, T b) { return !(a < b); }
template <class T> bool is_num(T a, T b) { return !is_nan(a) && !is_nan(b); }
template <class T> bool is_nan(T a, T b) { return is_nan(a) || is_nan(b); }
