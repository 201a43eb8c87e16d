/* COM1, by polling. */
#include "guest.h"

#define COM1 0x3f8
#define LINE_STATUS (COM1 + 5)
#define DATA_READY 1

void print(const char *text) {
    while (*text) out8(COM1, (u8)*text++);
}

void print_number(u64 number) {
    char digits[21];
    char *at = digits + sizeof digits - 1;
    *at = 0;
    do *--at = (char)('0' + number % 10); while (number /= 10);
    print(at);
}

void print_hex(u64 number) {
    char digits[17];
    char *at = digits + sizeof digits - 1;
    *at = 0;
    do *--at = "0123456789abcdef"[number & 15]; while (number >>= 4);
    print("0x");
    print(at);
}

void field(const char *key, u64 number) {
    print(" ");
    print(key);
    print("=");
    print_number(number);
}

void field_hex(const char *key, u64 number) {
    print(" ");
    print(key);
    print("=");
    print_hex(number);
}

void end_line(void) { print("\n"); }

/* Whether something waits to be read. */
int is_typed(void) { return in8(LINE_STATUS) & DATA_READY; }

void read_line(char *line, u32 size) {
    u32 length = 0;
    for (;;) {
        while (!is_typed()) __asm__ volatile("pause");
        char c = (char)in8(COM1);
        if (c == '\n' || c == '\r') {
            if (length) break;
            continue;
        }
        if (length + 1 < size) line[length++] = c;
    }
    line[length] = 0;
}
