/* SPDX-License-Identifier: Apache-2.0 */
/*
 * System calls without libc.
 *
 * The agent lives in someone else's process. Its calls must not touch that process's errno, must
 * not go through the calls that it interposes itself, and from freeze to thaw must not take any
 * lock of libc's: a thread of the VMM may hold one while it waits for the very page that is
 * frozen. Every function here returns the kernel's answer: a value, or -errno.
 */
#ifndef MEMD_PAGES_SYS_H
#define MEMD_PAGES_SYS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

#if defined(__clang_analyzer__)
/* The analyzer can't see through the assembly: to it, this is a call that may do anything. */
long sys_call6(long number, long a, long b, long c, long d, long e, long f);
#elif defined(__x86_64__)
static inline long sys_call6(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}
#elif defined(__aarch64__)
static inline long sys_call6(long number, long a, long b, long c, long d, long e, long f)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;

    __asm__ volatile("svc #0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "memory");
    return x0;
}
#else
#error "memd's agent knows x86-64 and arm64"
#endif

#define SYS_ARG(x)            ((long)(uintptr_t)(x))
#define sys_call0(n)          sys_call6((n), 0, 0, 0, 0, 0, 0)
#define sys_call1(n, a)       sys_call6((n), SYS_ARG(a), 0, 0, 0, 0, 0)
#define sys_call2(n, a, b)    sys_call6((n), SYS_ARG(a), SYS_ARG(b), 0, 0, 0, 0)
#define sys_call3(n, a, b, c) sys_call6((n), SYS_ARG(a), SYS_ARG(b), SYS_ARG(c), 0, 0, 0)
#define sys_call4(n, a, b, c, d) \
    sys_call6((n), SYS_ARG(a), SYS_ARG(b), SYS_ARG(c), SYS_ARG(d), 0, 0)
#define sys_call5(n, a, b, c, d, e) \
    sys_call6((n), SYS_ARG(a), SYS_ARG(b), SYS_ARG(c), SYS_ARG(d), SYS_ARG(e), 0)

static inline int sys_ioctl(int fd, unsigned long request, void *argument)
{
    return (int)sys_call3(SYS_ioctl, fd, request, argument);
}

/* The address, or -errno in the pointer: test with sys_failed(). */
static inline void *sys_mmap(void *addr, size_t bytes, int prot, int flags, int fd, long offset)
{
    return (void *)sys_call6(SYS_mmap, SYS_ARG(addr), SYS_ARG(bytes), prot, flags, fd, offset);
}

static inline int sys_failed(const void *result)
{
    return (uintptr_t)result >= (uintptr_t)-4095L;
}

static inline int sys_munmap(void *addr, size_t bytes)
{
    return (int)sys_call2(SYS_munmap, addr, bytes);
}

static inline void *sys_mremap(void *old, size_t old_bytes, size_t new_bytes, int flags, void *to)
{
    return (void *)sys_call5(SYS_mremap, old, old_bytes, new_bytes, flags, to);
}

static inline int sys_madvise(void *addr, size_t bytes, int advice)
{
    return (int)sys_call3(SYS_madvise, addr, bytes, advice);
}

static inline int sys_close(int fd)
{
    return (int)sys_call1(SYS_close, fd);
}

static inline long sys_read(int fd, void *buffer, size_t bytes)
{
    return sys_call3(SYS_read, fd, buffer, bytes);
}

#endif
