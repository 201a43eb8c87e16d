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

/* What another processor begins with, in real mode, copied to a page below 1 MiB (smp.c): it goes straight to long mode
 * on the first one's page tables, and to its stack. */
    .globl ap_start, ap_end, ap_root, ap_stack
    .code16
ap_start:
    cli
    mov %cs, %ax
    mov %ax, %ds
    xor %ebx, %ebx
    mov %ax, %bx
    shl $4, %ebx
    /* The table's own address and the way on are where this was copied to. */
    lea (ap_gdt - ap_start)(%ebx), %eax
    movl %eax, (ap_gdt_address - ap_start)
    lgdtl (ap_gdt_limit - ap_start)
    lea (ap_long - ap_start)(%ebx), %eax
    movl %eax, (ap_way_on - ap_start)
    mov $0x20, %eax
    mov %eax, %cr4
    movl (ap_root - ap_start), %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    and $0x9fffffff, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    ljmpl *(ap_way_on - ap_start)
    .code64
ap_long:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov ap_stack(%rip), %rsp
    mov $ap_run, %eax
    call *%rax
0:  hlt
    jmp 0b
    .balign 8
ap_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
ap_gdt_limit:
    .word . - ap_gdt - 1
ap_gdt_address:
    .long 0
ap_way_on:
    .long 0
    .word 8
ap_root:
    .long 0
    .balign 8
ap_stack:
    .quad 0
ap_end:

    .section .bss
    .balign 16
    .skip 65536
stack_end:

    .section .note.GNU-stack, "", @progbits
