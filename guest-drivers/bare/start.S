/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where every vCPU of the bare guest begins (see address_map.h for the state it is in), and the
 * gates of the exceptions, each of which leads to crash().
 */
    .section .text.start, "ax"
    .code64
    .globl start
start:
    lgdt gdt_pointer(%rip)
    lidt idt_pointer(%rip)
    /* A stack for each: stacks + (number + 1) * 16 KiB. */
    leaq 1(%rsi), %rax
    shlq $14, %rax
    leaq stacks(%rip), %rsp
    addq %rax, %rsp
    xorl %ebp, %ebp
    call guest_main
1:  hlt
    jmp 1b

/* An entry pushes what the processor did not (an error code, where there is none) and its number. */
    .macro gate number, error
gate_\number:
    .if \error == 0
    pushq $0
    .endif
    pushq $\number
    jmp crashed
    .endm

    .text
    .irp number, 0,1,2,3,4,5,6,7,9,15,16,18,19,20,22,23,24,25,26,27,28,31
    gate \number, 0
    .endr
    .irp number, 8,10,11,12,13,14,17,21,29,30
    gate \number, 1
    .endr

/* Stack: number, error code, rip, ... Nothing returns from here. */
crashed:
    movq (%rsp), %rdi
    movq 8(%rsp), %rsi
    movq 16(%rsp), %rdx
    movq %cr2, %rcx
    andq $-16, %rsp
    call crash
1:  hlt
    jmp 1b

    .section .rodata
    .balign 8
    .globl gates
gates:
    .irp number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .quad gate_\number
    .endr

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff /* 0x08: 64-bit code */
    .quad 0x00cf93000000ffff /* 0x10: data */
gdt_pointer:
    .word . - gdt - 1
    .quad gdt
    .balign 8
idt_pointer:
    .word 32 * 16 - 1
    .quad idt

    .bss
    .balign 16
    .globl idt
idt:
    .skip 32 * 16
    .balign 4096
stacks:
    .skip 8 * 16384
    .section .note.GNU-stack, "", @progbits
