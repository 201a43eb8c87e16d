/* Entered in long mode by Linux's 64-bit boot protocol: RSI is the zero page, interrupts are off, the first 4 GiB
 * are mapped one to one. */
    .section .text.start, "ax"
    .globl _start
_start:
    lea stack_end(%rip), %rsp
    mov %rsi, %rdi
    call run
0:  hlt
    jmp 0b

    .section .bss
    .balign 16
    .skip 65536
stack_end:

    .section .note.GNU-stack, "", @progbits
