/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The one histogram of the project. Octaves are powers of two of the base unit (seconds, bytes), each cut into eight
 * (schema 3); slot bounds are 2^(i/8), inclusive above. Slot 0 holds all up to the first bound; what is above the last
 * counts as overflow (+Inf) only.
 *
 * No value is converted, so none is rounded: a value v (an integer, in nanoseconds or bytes) is shifted until
 * its octave is the one that ends at UNIT << TOP, and then compared with floor(UNIT * 2^(TOP - 1) * 2^(i/8)), where
 * UNIT is a base unit in raw units (10^9, 1). An integer is at or below a bound exactly when it is at or below the
 * bound's floor. daemon/histogram.py holds the same with exact arithmetic.
 */
#ifndef BPFMETRICSD_HISTOGRAM_H
#define BPFMETRICSD_HISTOGRAM_H

#define SLOTS_PER_OCTAVE 8

/* Programs that never run twice at once on a CPU, interrupts included, may define PLAIN_INCREMENTS. */
#ifdef PLAIN_INCREMENTS
#define ADD(pointer, amount) (*(pointer) += (amount))
#else
#define ADD(pointer, amount) __sync_fetch_and_add((pointer), (amount))
#endif

static __always_inline u32 highest_bit(u64 value)
{
	u32 bit = 0;

	if (value >> 32) { value >>= 32; bit += 32; }
	if (value >> 16) { value >>= 16; bit += 16; }
	if (value >> 8) { value >>= 8; bit += 8; }
	if (value >> 4) { value >>= 4; bit += 4; }
	if (value >> 2) { value >>= 2; bit += 2; }
	return bit + (value >> 1);
}

/* How many of seven ascending bounds lie below the value. */
#define ABOVE(value, b1, b2, b3, b4, b5, b6, b7)                                                  \
	((value) > (b4) ? ((value) > (b6) ? 6 + ((value) > (b7)) : 4 + ((value) > (b5)))          \
			: ((value) > (b2) ? 2 + ((value) > (b3)) : 0 + ((value) > (b1))))

/*
 * Seconds, from nanoseconds: 2^-20 to 2^5. FIRST is floor(10^9 / 2^20); the value is shifted by 20 so that the first
 * bound is a whole number, and 2^29 is the highest power of two in 10^9.
 */
#define SECONDS_OCTAVES 25
#define SECONDS_SLOTS (SECONDS_OCTAVES * SLOTS_PER_OCTAVE + 1)
#define SECONDS_FIRST 953ULL
#define SECONDS_LAST 32000000000ULL

struct seconds_histogram {
	u64 slots[SECONDS_SLOTS];
	u64 overflow;
	u64 sum; /* ns */
};

static __always_inline u32 seconds_slot(u64 ns)
{
	u64 scaled = ns << 20;
	u32 octave;

	if (ns <= SECONDS_FIRST)
		return 0;
	if (ns > SECONDS_LAST)
		return SECONDS_SLOTS;
	octave = highest_bit(scaled - 1) - 29;
	if (scaled > 1000000000ULL << octave)
		octave++;
	scaled <<= 34 - octave;
	return 1 + (octave - 1) * SLOTS_PER_OCTAVE +
	       ABOVE(scaled, 9367390095664785123ULL, 10215211334214395865ULL, 11139766950770582417ULL,
		     12148001999904198769ULL, 13247490117328543392ULL, 14446490411353358019ULL,
		     15754009503455335899ULL);
}

/* Bytes: 2^0 to 2^30. */
#define BYTES_OCTAVES 30
#define BYTES_SLOTS (BYTES_OCTAVES * SLOTS_PER_OCTAVE + 1)

struct bytes_histogram {
	u64 slots[BYTES_SLOTS];
	u64 overflow;
	u64 sum; /* bytes */
};

static __always_inline u32 bytes_slot(u64 bytes)
{
	u32 octave;

	if (bytes <= 1)
		return 0;
	if (bytes > 1ULL << BYTES_OCTAVES)
		return BYTES_SLOTS;
	octave = highest_bit(bytes - 1) + 1;
	bytes <<= 63 - octave;
	return 1 + (octave - 1) * SLOTS_PER_OCTAVE +
	       ABOVE(bytes, 5029079263719320435ULL, 5484249825272419511ULL, 5980616842327661685ULL,
		     6521908912666391106ULL, 7112192101001162094ULL, 7755900482342532474ULL,
		     8457869449776733335ULL);
}

/* Which octave a slot belongs to: 0 for slot 0, the number of octaves plus one for overflow. */
#define OCTAVE_OF(slot) (((slot) + SLOTS_PER_OCTAVE - 1) / SLOTS_PER_OCTAVE)

/*
 * Adds one value; gives the octave, which indexes the exemplars. Hidden once more inside the branch, because verifiers
 * before 6.18 lose the bound where the compiler tests one register and indexes with a copy.
 */
#define OBSERVE(kind, KIND, histogram, value)                              \
	({                                                                 \
		u64 __slot = kind##_slot(value);                           \
		HIDE(__slot);                                              \
		if (__slot < KIND##_SLOTS) {                               \
			HIDE(__slot);                                      \
			ADD(&(histogram)->slots[__slot], 1);               \
		} else                                                     \
			ADD(&(histogram)->overflow, 1);                    \
		ADD(&(histogram)->sum, (value));                           \
		OCTAVE_OF(__slot);                                         \
	})
#define OBSERVE_SECONDS(histogram, value) OBSERVE(seconds, SECONDS, histogram, value)
#define OBSERVE_BYTES(histogram, value) OBSERVE(bytes, BYTES, histogram, value)

/* Exemplar places for a histogram: slot 0, each octave, overflow. */
#define SECONDS_EXEMPLARS (SECONDS_OCTAVES + 2)
#define BYTES_EXEMPLARS (BYTES_OCTAVES + 2)

#endif
