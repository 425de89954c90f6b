/* Runs the ARM64 bodies on random and extreme codes and compares with plain integer arithmetic. Prints the number of cases. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { BLOCK = 128, BLOCK_BYTES = 32, PANEL = 8, REPEATS = 20 };

int32_t row(int64_t weights, int64_t activations, int64_t blocks);
void panel(int64_t weights, int64_t activations, int64_t blocks, int64_t out);

static uint64_t state = 88172645463325252u;

static uint32_t draw(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 11);
}

/* One case: returns 0 when row and panel give the integers. kind 0: all codes 2, all -128; kind 1: all 127; else random. */
static int check(size_t blocks, int kind) {
    size_t k = blocks * BLOCK;
    uint8_t *w = calloc(blocks * BLOCK_BYTES + 16384, 1); /* room for what is asked for in advance */
    int8_t *q = malloc(PANEL * k), *single = malloc(k), *eight = malloc(PANEL * k);
    int32_t want[PANEL] = {0}, out[PANEL];
    for (size_t i = 0; i < k; i++) w[i / 4] |= (kind == 0 ? 2 : draw() % 3) << 2 * (i % 4);
    for (size_t i = 0; i < PANEL * k; i++) q[i] = kind == 0 ? -128 : kind == 1 ? 127 : (int8_t)draw();
    for (size_t t = 0; t < PANEL; t++) {
        out[t] = 7 * (int32_t)t;
        for (size_t i = 0; i < k; i++) {
            size_t b = i / BLOCK, j = i % BLOCK / 4, p = i % 4;
            int8_t value = q[t * k + i];
            want[t] += (w[i / 4] >> 2 * (i % 4) & 3) * value;
            eight[((b * PANEL + t) * 4 + p) * 32 + j] = value;
            if (t == 0) single[(b * 4 + p) * 32 + j] = value;
        }
    }
    int wrong = row((int64_t)w, (int64_t)single, (int64_t)blocks) != want[0];
    panel((int64_t)w, (int64_t)eight, (int64_t)blocks, (int64_t)out);
    for (size_t t = 0; t < PANEL; t++) wrong |= out[t] != want[t] + 7 * (int32_t)t;
    free(w), free(q), free(single), free(eight);
    return wrong;
}

int main(void) {
    const size_t sizes[] = {1, 2, 3, 15, 16, 17, 20, 54, 80, 400};
    int cases = 0;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        for (int repeat = 0; repeat < REPEATS; repeat++, cases++) {
            if (check(sizes[s], repeat)) {
                printf("wrong: %zu blocks, repeat %d\n", sizes[s], repeat);
                return 1;
            }
        }
    }
    printf("%d cases equal\n", cases);
    return 0;
}
