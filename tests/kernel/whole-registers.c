/* A User-Mode Linux of 6.1 on a processor with AMX: its buffer for a process's extended registers is too small for
 * theirs. It reads what fits, and what it writes back later the host refuses as too short, so that the guest dies at its
 * first process ("ptrace set fp regs failed"). Preloaded, this writes the rest back as it is. The guest knows nothing of
 * AMX, so nobody in it uses what it does not keep. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PEEK_FIRST = 1, PEEK_LAST = 3, GET_REGISTERS = 0x4204, SET_REGISTERS = 0x4205, EXTENDED = 0x202 };

static char whole[1 << 16];

long ptrace(int request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    int process = va_arg(arguments, int);
    unsigned long address = va_arg(arguments, unsigned long);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (request >= PEEK_FIRST && request <= PEEK_LAST) {
        /* The system call stores the word; the library's function returns it. */
        long word, failed = syscall(SYS_ptrace, request, process, address, &word);
        return failed < 0 ? failed : word;
    }
    if (request == SET_REGISTERS && address == EXTENDED) {
        struct iovec *given = data, now = { whole, sizeof whole };
        if (syscall(SYS_ptrace, GET_REGISTERS, process, address, &now) == 0 && now.iov_len > given->iov_len) {
            memcpy(whole, given->iov_base, given->iov_len);
            return syscall(SYS_ptrace, request, process, address, &now);
        }
    }
    return syscall(SYS_ptrace, request, process, address, data);
}
