/* One pass over BF16 numbers: find each tile's largest magnitude, then round to FP8 with a power-of-two scale and back.
 * The numbers are those of infir2.fp8.fake_quantize, which says why; tests/test_fp8.py compares them bit for bit.
 * A number of FP8 keeps the mantissa bits of its format, and below the smallest normal one a fixed step. Adding
 * 1.5 * 2^n, n chosen so that the sum's last bit is the step, makes the adder round to nearest even. */

#include <stdint.h>
#include <string.h>

#define BLOCK 128

static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

/* Bits of the smallest normal number of a tile in x's own units, a power of two; 0 where the tile's range is not
 * ordinary: then the caller has to take the longer way. `largest`: bits of BF16, without a sign. */
static inline uint32_t smallest_normal(uint16_t largest, float format_max, float format_smallest) {
    const uint16_t low = (127 - 100) << 7, high = (127 + 100) << 7;
    if (largest > high || (largest != 0 && largest < low)) return 0;
    float amax = largest ? as_float((uint32_t)largest << 16) : format_max;
    float scale = as_float(as_bits(format_max / amax) & 0xff800000u);
    return as_bits(format_smallest / scale);
}

static inline uint32_t rounded(uint16_t x, uint32_t smallest, float magic) {
    uint32_t bits = (uint32_t)x << 16, power = bits & 0x7f800000u;
    power = power > smallest ? power : smallest;
    float shift = magic * as_float(power);
    float sum = as_float(bits) + shift;
    return as_bits(sum - shift) | (bits & 0x80000000u);
}

/* x, [rows, columns] of BF16, contiguous. tile_rows x tile_columns is 1 x 128, 128 x 1 or 128 x 128, and divides them.
 * out: BF16 or, if `wide`, FP32. scratch: room for `columns` numbers of 16 and of 32 bits. Returns 0; 1 where a tile's
 * range is not ordinary, and out is then unfinished. */
int fake_quantize(const uint16_t *x, void *out, int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns,
                  int wide, float format_max, float format_smallest, float format_eps, uint16_t *largest,
                  uint32_t *smallest) {
    const float magic = 1.5f * format_eps * 8388608.0f; /* 2^23: FP32's mantissa */
    for (int64_t top = 0; top < rows; top += tile_rows) {
        memset(largest, 0, columns * sizeof *largest);
        for (int64_t r = top; r < top + tile_rows; r++) {
            const uint16_t *row = x + r * columns;
            for (int64_t c = 0; c < columns; c++) {
                uint16_t magnitude = row[c] & 0x7fff;
                largest[c] = largest[c] > magnitude ? largest[c] : magnitude;
            }
        }
        if (tile_columns == BLOCK)
            for (int64_t left = 0; left < columns; left += BLOCK) {
                uint16_t of_tile = 0;
                for (int64_t c = left; c < left + BLOCK; c++) of_tile = of_tile > largest[c] ? of_tile : largest[c];
                uint32_t found = smallest_normal(of_tile, format_max, format_smallest);
                if (!found) return 1;
                for (int64_t c = left; c < left + BLOCK; c++) smallest[c] = found;
            }
        else
            for (int64_t c = 0; c < columns; c++)
                if (!(smallest[c] = smallest_normal(largest[c], format_max, format_smallest))) return 1;
        for (int64_t r = top; r < top + tile_rows; r++) {
            const uint16_t *row = x + r * columns;
            if (wide) {
                uint32_t *to = (uint32_t *)out + r * columns;
                for (int64_t c = 0; c < columns; c++) to[c] = rounded(row[c], smallest[c], magic);
            } else {
                uint16_t *to = (uint16_t *)out + r * columns;
                for (int64_t c = 0; c < columns; c++) to[c] = rounded(row[c], smallest[c], magic) >> 16;
            }
        }
    }
    return 0;
}
