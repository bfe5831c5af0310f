// What translated PTX runs on: one program after the other, 32 lanes of a warp at a time.
//
// translate.py cuts a kernel into segments: code that every lane runs by itself, or one instruction that a warp runs
// as a whole. Every lane has a place, the segment that it runs next. Of a warp the lanes furthest behind run first, so
// that those that branched apart meet again; warps run in turn from barrier to barrier.
#include <deque>
#include <string>
#include <vector>

#include "instructions.h"

using std::string;
using std::to_string;
constexpr uint32_t ALL = 0xffffffff, LANES = 32;
constexpr uint32_t POISON = 0xffffffff;  // of registers; memory starts as bytes of it
constexpr uint16_t EXIT = 0xffff;        // the place of lanes that have returned

struct Failure {
    int line;  // of the PTX
    string text;
};

// ---------------------------------------------------------------------------------------------- memory

struct Range {
    uint64_t first, end;

    bool holds(uint64_t address, uint32_t bytes) const {
        return address >= first && address < end && bytes <= end - address;
    }
};

// Global memory that a launch may access: that of the tensors it was given.
struct Global {
    const Range *ranges;
    int count;
    const Range *last;  // accessed

    uint8_t *at(uint64_t address, uint32_t bytes, int line, uint32_t alignment) {
        if (address % alignment) throw Failure{line, "accesses global memory that is not aligned"};
        if (last->holds(address, bytes)) return reinterpret_cast<uint8_t *>(address);
        const Range *nearest = ranges;
        for (const Range *range = ranges; range < ranges + count; ++range) {
            if (range->holds(address, bytes)) {
                last = range;
                return reinterpret_cast<uint8_t *>(address);
            }
            if (range->first <= address && (range->first > nearest->first || nearest->first > address)) nearest = range;
        }
        throw Failure{line, "accesses " + to_string(bytes) + " bytes outside of every tensor: byte " +
                                to_string(int64_t(address - nearest->first)) + " of one of " +
                                to_string(nearest->end - nearest->first)};
    }
};

// Shared memory of a program, and who accessed each byte since the last barrier.
//
// A byte that one warp writes and another one reads or writes without a barrier between is an error, unless both write
// the same. The accesses of one warp count as ordered. What cp.async copies arrives when the warp waits for it, no
// sooner; until then every access to it is an error.
struct Shared {
    static constexpr int32_t COMING = std::numeric_limits<int32_t>::max();  // a copy that is not waited for yet
    std::vector<uint8_t> data, copies;
    std::vector<int32_t> writers, readers;  // marks
    int32_t turn = 64;                      // marks from here on are of this turn, between two barriers

    static constexpr int32_t SEVERAL = 63;  // readers
    void start(uint32_t bytes) {
        data.assign(bytes, POISON & 255);
        copies.assign(bytes, 0);
        writers.assign(bytes, 0);
        readers.assign(bytes, 0);
        turn = 64;
    }
    uint32_t checked(uint64_t address, uint32_t bytes, int line) {
        if (address % bytes == 0 && address + bytes <= data.size()) return address;
        const char *why = address % bytes ? "accesses shared memory that is not aligned" : "accesses shared memory";
        throw Failure{line, why + (" at byte " + to_string(address)) + " of " + to_string(data.size())};
    }
    [[noreturn]] void clash(const char *what, uint32_t address, uint32_t bytes, int line) {
        const char *why = ", which another warp accessed since the last barrier";
        for (uint32_t i = address; i < address + bytes; ++i)
            if (writers[i] == COMING) why = ", where a copy is not waited for";
        throw Failure{line, string(what) + " shared memory at byte " + to_string(address) + why};
    }
    template <uint32_t BYTES> const uint8_t *read(uint32_t warp, uint64_t at, int line) {
        uint32_t address = checked(at, BYTES, line);
        int32_t mark = turn + int32_t(warp), *writer = &writers[address], *reader = &readers[address];
        bool is_clash = false;
        for (uint32_t i = 0; i < BYTES; ++i) {
            is_clash |= (writer[i] >= turn) & (writer[i] != mark);
            reader[i] = (reader[i] < turn) | (reader[i] == mark) ? mark : turn + SEVERAL;
        }
        if (is_clash) clash("reads", address, BYTES, line);
        return &data[address];
    }
    template <uint32_t BYTES> void write(uint32_t warp, uint64_t at, const uint8_t *bytes, int line) {
        uint32_t address = checked(at, BYTES, line);
        int32_t mark = turn + int32_t(warp), *writer = &writers[address], *reader = &readers[address];
        bool is_clash = false;
        for (uint32_t i = 0; i < BYTES; ++i) {
            is_clash |= (reader[i] >= turn) & (reader[i] != mark);
            bool is_same = (writer[i] != COMING) & (data[address + i] == bytes[i]);
            is_clash |= (writer[i] >= turn) & (writer[i] != mark) & !is_same;
            writer[i] = mark;
        }
        if (is_clash) clash("writes", address, BYTES, line);
        memcpy(&data[address], bytes, BYTES);
    }
    void copy(uint32_t warp, uint32_t address, uint32_t count, const uint8_t *bytes, int line) {
        int32_t mark = turn + int32_t(warp);
        for (uint32_t i = address; i < address + count; ++i) {
            bool is_clash = readers[i] >= turn && readers[i] != mark;
            if (writers[i] == COMING) is_clash |= copies[i] != bytes[i - address];
            else is_clash |= writers[i] >= turn && writers[i] != mark;
            if (is_clash) clash("copies to", address, count, line);
            writers[i] = COMING;
        }
        memcpy(&copies[address], bytes, count);
    }
    void arrive(uint32_t warp, uint32_t address, uint32_t count) {
        std::fill_n(&writers[address], count, turn + warp);
        memcpy(&data[address], &copies[address], count);
    }
};

struct Program {
    const uint64_t *params;
    uint32_t ctaid[3], nctaid[3];
    Global global;
    Shared shared;
};

struct Copy {
    uint32_t address, bytes;
};

struct WarpState {
    Program *program;
    uint32_t number;
    alignas(64) uint16_t place[LANES];
    std::vector<Copy> open;                 // copies that no group holds yet
    std::deque<std::vector<Copy>> groups;  // committed, not waited for
    int lane;                               // that runs, for messages
};

template <class T, uint32_t COUNT> struct Values {
    T value[COUNT];
    T operator[](int i) const { return value[i]; }
};

template <class T, uint32_t COUNT> Values<T, COUNT> load_global(WarpState &w, uint64_t address, int line) {
    Values<T, COUNT> found;
    memcpy(&found, w.program->global.at(address, sizeof(found), line, sizeof(found)), sizeof(found));
    return found;
}
template <class T, uint32_t COUNT>
void store_global(WarpState &w, uint64_t address, Values<T, COUNT> values, int line) {
    memcpy(w.program->global.at(address, sizeof(values), line, sizeof(values)), &values, sizeof(values));
}
template <class T, uint32_t COUNT> Values<T, COUNT> load_shared(WarpState &w, uint64_t address, int line) {
    Values<T, COUNT> found;
    memcpy(&found, w.program->shared.read<sizeof(found)>(w.number, address, line), sizeof(found));
    return found;
}
template <class T, uint32_t COUNT>
void store_shared(WarpState &w, uint64_t address, Values<T, COUNT> values, int line) {
    uint8_t bytes[sizeof(values)];
    memcpy(bytes, &values, sizeof(values));
    w.program->shared.write<sizeof(values)>(w.number, address, bytes, line);
}
template <class T, class Change> T atomic(WarpState &w, uint64_t address, Change change, int line) {
    uint8_t *at = w.program->global.at(address, sizeof(T), line, sizeof(T));
    T before, after;
    memcpy(&before, at, sizeof(T));
    after = change(before);
    memcpy(at, &after, sizeof(T));
    return before;
}
inline void copy_async(WarpState &w, uint32_t to, uint64_t from, uint32_t bytes, uint32_t source_bytes, int line) {
    uint8_t found[16] = {};
    if (source_bytes > bytes) throw Failure{line, "copies more bytes than there is room for"};
    if (source_bytes) memcpy(found, w.program->global.at(from, source_bytes, line, bytes), source_bytes);
    Shared &shared = w.program->shared;
    shared.copy(w.number, shared.checked(to, bytes, line), bytes, found, line);
    w.open.push_back({to, bytes});
}
inline void commit_group(WarpState &w) {
    w.groups.push_back(std::move(w.open));
    w.open.clear();
}
inline void wait_group(WarpState &w, size_t left) {
    for (; w.groups.size() > left; w.groups.pop_front())
        for (Copy &copy : w.groups.front()) w.program->shared.arrive(w.number, copy.address, copy.bytes);
}

// ---------------------------------------------------------------------------------------------- of whole warps

using Register = uint32_t[LANES];

enum Shuffle { up, down, bfly, idx };

// The lane that a lane takes its value from.
inline uint32_t shuffle_source(Shuffle mode, uint32_t lane, uint32_t b, uint32_t c) {
    uint32_t segment = c >> 8 & 31, bound = (lane & segment) | (c & 31 & ~segment);
    b &= 31;
    uint32_t sources[] = {lane - b, lane + b, lane ^ b, (lane & segment) | (b & ~segment)}, source = sources[mode];
    return (mode == up ? int32_t(source) >= int32_t(bound) : source <= bound) ? source : lane;
}
inline void check_members(uint32_t members, int line) {
    if (members != ALL) throw Failure{line, "names only some threads of its warp"};
}
template <class T> T reduced(const Register &values, T (*combine)(T, T)) {
    T total = T(values[0]);
    for (uint32_t lane = 1; lane < LANES; ++lane) total = combine(total, T(values[lane]));
    return total;
}
using Four = Register *const (&)[4];
using Two = Register *const (&)[2];

template <int K> void multiply(const float (&left)[16][K], const float (&right)[K][8], Four d, Four c) {
    float sums[16][8];
    for (uint32_t lane = 0; lane < LANES; ++lane)
        for (int r = 0; r < 4; ++r) sums[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = as<float>((*c[r])[lane]);
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < 8; ++n) sums[m][n] += left[m][k] * right[k][n];
    for (uint32_t lane = 0; lane < LANES; ++lane)
        for (int r = 0; r < 4; ++r) (*d[r])[lane] = put(sums[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]);
}
// [16, 16] @ [16, 8]
template <class T> void mma_16(Four d, Four a, Two b, Four c) {
    float left[16][16], right[16][8];
    auto half = [](uint32_t bits, int i) { return to_float(T{uint16_t(bits >> 16 * i)}); };
    for (uint32_t lane = 0; lane < LANES; ++lane)
        for (int i = 0; i < 2; ++i) {
            uint32_t row = lane / 4, column = lane % 4 * 2 + i;
            for (int r = 0; r < 4; ++r) left[row + r % 2 * 8][column + r / 2 * 8] = half((*a[r])[lane], i);
            for (int r = 0; r < 2; ++r) right[column + r * 8][row] = half((*b[r])[lane], i);
        }
    multiply(left, right, d, c);
}
// [16, 8] @ [8, 8], of the upper 19 bits of every float
inline void mma_8(Four d, Four a, Two b, Four c) {
    float left[16][8], right[8][8];
    for (uint32_t lane = 0; lane < LANES; ++lane) {
        uint32_t row = lane / 4, column = lane % 4;
        for (int r = 0; r < 4; ++r) left[row + r % 2 * 8][column + r / 2 * 4] = as<float>((*a[r])[lane] & 0xffffe000);
        for (int r = 0; r < 2; ++r) right[column + r * 4][row] = as<float>((*b[r])[lane] & 0xffffe000);
    }
    multiply(left, right, d, c);
}
// COUNT matrices of 8 x 8 halves, whose rows of 16 bytes the lanes point to
template <int COUNT, bool IS_TRANSPOSED>
void load_matrices(WarpState &w, Register *const (&d)[COUNT], const Register &addresses, int line) {
    uint16_t rows[8 * COUNT][8];
    for (int i = 0; i < 8 * COUNT; ++i) {
        w.lane = i;
        memcpy(rows[i], w.program->shared.read<16>(w.number, addresses[i], line), 16);
    }
    for (int m = 0; m < COUNT; ++m)
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            auto at = [&](uint32_t row, uint32_t column) -> uint32_t {
                return IS_TRANSPOSED ? rows[8 * m + column][row] : rows[8 * m + row][column];
            };
            (*d[m])[lane] = at(lane / 4, lane % 4 * 2 + 1) << 16 | at(lane / 4, lane % 4 * 2);
        }
}

// ---------------------------------------------------------------------------------------------- the order of it all

enum Kind { LANE, WARP, BARRIER };

template <class Warp> struct Segment {
    Kind kind;
    int line;
    void (*run)(Warp &, uint32_t lanes);
};

// The segment that a warp runs next, and which of its lanes.
template <class Warp> uint16_t next_segment(Warp &w, const Segment<Warp> *segments, uint32_t &lanes) {
    uint16_t floor = 0;
    for (;;) {
        uint16_t least = EXIT, all_lanes_at = w.place[0];
        bool is_together = true;
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            uint16_t place = w.place[lane];
            is_together &= place == all_lanes_at;
            least = std::min(least, place >= floor ? place : EXIT);
        }
        lanes = ALL;
        if (is_together) return least;
        uint32_t left = 0;
        lanes = 0;
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            lanes |= uint32_t(w.place[lane] == least) << lane;
            left |= uint32_t(w.place[lane] != EXIT) << lane;
        }
        if (least == EXIT) break;  // none left, or only lanes that wait for others
        if (segments[least].kind == LANE || (segments[least].kind == BARRIER && lanes == left)) return least;
        floor = least + 1;  // lanes that are elsewhere may yet come here
    }
    uint16_t waiting = EXIT;
    for (uint16_t place : w.place) waiting = std::min(waiting, place);
    for (w.lane = 0; w.place[w.lane] != waiting;) ++w.lane;
    throw Failure{segments[waiting].line, "waits for other threads of its warp, which have left or wait elsewhere"};
}

// Run a warp up to a barrier; whether it came to one.
template <class Warp> bool run_warp(Warp &w, const Segment<Warp> *segments) {
    for (;;) {
        uint32_t lanes;
        uint16_t number = next_segment(w, segments, lanes);
        if (number == EXIT) return false;
        const Segment<Warp> &segment = segments[number];
        w.lane = 0;
        if (segment.kind != BARRIER) segment.run(w, lanes);
        if (segment.kind != LANE)
            for (uint32_t lane = 0; lane < LANES; ++lane)
                if (lanes >> lane & 1) w.place[lane] = number + 1;
        if (segment.kind == BARRIER) return true;
    }
}

template <class Warp>
void run_program(Program &program, std::vector<Warp> &warps, const Segment<Warp> *segments, Warp *&current) {
    for (Warp &w : warps) {
        std::fill_n(w.place, LANES, 0);
        w.open.clear();
        w.groups.clear();
    }
    for (bool is_running = true; is_running; program.shared.turn += 64) {
        is_running = false;
        for (Warp &w : warps) {
            current = &w;
            is_running |= run_warp(w, segments);
        }
    }
}

struct Launch {  // as in launch.py
    uint32_t grid[3], num_warps, shared_bytes;
    int num_ranges;
    const uint64_t *params;
    const Range *ranges;
};

// Run a grid. What failed is written to `message`: the line of the PTX and a text.
template <class Registers, class Warp>
int run_grid(const Segment<Warp> *segments, const Launch &launch, char *message, size_t message_bytes) {
    const uint32_t *grid = launch.grid, num_warps = launch.num_warps;
    Global global{launch.ranges, launch.num_ranges, launch.ranges};
    Program program{launch.params, {}, {grid[0], grid[1], grid[2]}, global, {}};
    std::vector<Warp> warps(num_warps);
    for (uint32_t i = 0; i < num_warps; ++i) {
        memset(static_cast<Registers *>(&warps[i]), POISON & 255, sizeof(Registers));
        warps[i].program = &program;
        warps[i].number = i;
    }
    Warp *current = &warps[0];
    try {
        for (uint32_t z = 0; z < grid[2]; ++z)
            for (uint32_t y = 0; y < grid[1]; ++y)
                for (uint32_t x = 0; x < grid[0]; ++x) {
                    program.ctaid[0] = x, program.ctaid[1] = y, program.ctaid[2] = z;
                    program.shared.start(launch.shared_bytes);
                    run_program(program, warps, segments, current);
                }
    } catch (const Failure &failure) {
        const uint32_t *at = program.ctaid;
        string place = "(" + to_string(at[0]) + ", " + to_string(at[1]) + ", " + to_string(at[2]) + ")";
        string thread = "thread " + to_string(current->number * LANES + current->lane) + " of program " + place;
        string text = to_string(failure.line) + " " + thread + " " + failure.text;
        strncpy(message, text.c_str(), message_bytes - 1);
        return 1;
    }
    return 0;
}
