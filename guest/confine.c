/* What a box may not do: capabilities and system calls. The list of calls follows Docker's default
 * profile (moby, profiles/seccomp), minus what a box has no use for; it is installed once, in the init,
 * and inherited by every command. */
#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "launch.h"

/* Numbers from 424 on are the same on every architecture; older headers lack the last ones. */
enum {
    N_process_mrelease = 448, N_futex_waitv = 449, N_cachestat = 451, N_fchmodat2 = 452,
    N_map_shadow_stack = 453, N_futex_wake = 454, N_futex_wait = 455, N_futex_requeue = 456,
    N_statmount = 457, N_listmount = 458, N_mseal = 462, N_LAST = 470,
};

static const int allowed[] = {
    SYS_accept, SYS_accept4, SYS_adjtimex, SYS_bind, SYS_brk, N_cachestat, SYS_capget, SYS_capset,
    SYS_chdir, SYS_chroot, SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep, SYS_close,
    SYS_close_range, SYS_connect, SYS_copy_file_range, SYS_dup, SYS_dup3, SYS_epoll_create1,
    SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_eventfd2, SYS_execve, SYS_execveat, SYS_exit,
    SYS_exit_group, SYS_faccessat, SYS_faccessat2, SYS_fadvise64, SYS_fallocate, SYS_fchdir, SYS_fchmod,
    SYS_fchmodat, N_fchmodat2, SYS_fchown, SYS_fchownat, SYS_fcntl, SYS_fdatasync, SYS_fgetxattr,
    SYS_flistxattr, SYS_flock, SYS_fremovexattr, SYS_fsetxattr, SYS_fstat, SYS_fstatfs, SYS_fsync,
    SYS_ftruncate, SYS_futex, N_futex_requeue, N_futex_wait, N_futex_waitv, N_futex_wake, SYS_getcpu,
    SYS_getcwd, SYS_getdents64, SYS_getegid, SYS_geteuid, SYS_getgid, SYS_getgroups, SYS_getitimer,
    SYS_getpeername, SYS_getpgid, SYS_getpid, SYS_getppid, SYS_getpriority, SYS_getrandom,
    SYS_getresgid, SYS_getresuid, SYS_getrlimit, SYS_get_robust_list, SYS_getrusage, SYS_getsid,
    SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_gettimeofday, SYS_getuid, SYS_getxattr,
    SYS_inotify_add_watch, SYS_inotify_init1, SYS_inotify_rm_watch, SYS_ioprio_get, SYS_ioprio_set, SYS_kill,
    SYS_landlock_add_rule, SYS_landlock_create_ruleset, SYS_landlock_restrict_self, SYS_lgetxattr,
    SYS_linkat, SYS_listen, N_listmount, SYS_listxattr, SYS_llistxattr, SYS_lremovexattr, SYS_lseek,
    SYS_lsetxattr, SYS_madvise, N_map_shadow_stack, SYS_membarrier, SYS_memfd_create, SYS_mincore,
    SYS_mkdirat, SYS_mknodat, SYS_mlock, SYS_mlock2, SYS_mlockall, SYS_mmap, SYS_mprotect,
    SYS_mq_getsetattr, SYS_mq_notify, SYS_mq_open, SYS_mq_timedreceive, SYS_mq_timedsend, SYS_mq_unlink,
    SYS_mremap, N_mseal, SYS_msgctl, SYS_msgget, SYS_msgrcv, SYS_msgsnd, SYS_msync, SYS_munlock,
    SYS_munlockall, SYS_munmap, SYS_name_to_handle_at, SYS_nanosleep, SYS_newfstatat, SYS_openat,
    SYS_openat2, SYS_pidfd_open, SYS_pidfd_send_signal, SYS_pipe2, SYS_pkey_alloc, SYS_pkey_free,
    SYS_pkey_mprotect, SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_prlimit64,
    N_process_mrelease, SYS_process_vm_readv, SYS_process_vm_writev, SYS_pselect6, SYS_ptrace,
    SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readahead, SYS_readlinkat, SYS_readv,
    SYS_recvfrom, SYS_recvmmsg, SYS_recvmsg, SYS_remap_file_pages, SYS_removexattr, SYS_renameat,
    SYS_renameat2, SYS_restart_syscall, SYS_rseq, SYS_rt_sigaction, SYS_rt_sigpending,
    SYS_rt_sigprocmask, SYS_rt_sigqueueinfo, SYS_rt_sigreturn, SYS_rt_sigsuspend, SYS_rt_sigtimedwait,
    SYS_rt_tgsigqueueinfo, SYS_sched_getaffinity, SYS_sched_getattr, SYS_sched_getparam,
    SYS_sched_get_priority_max, SYS_sched_get_priority_min, SYS_sched_getscheduler,
    SYS_sched_rr_get_interval, SYS_sched_setaffinity, SYS_sched_setattr, SYS_sched_setparam,
    SYS_sched_setscheduler, SYS_sched_yield, SYS_seccomp, SYS_semctl, SYS_semget, SYS_semop,
    SYS_semtimedop, SYS_sendfile, SYS_sendmmsg, SYS_sendmsg, SYS_sendto, SYS_setfsgid, SYS_setfsuid,
    SYS_setgid, SYS_setgroups, SYS_setitimer, SYS_setpgid, SYS_setpriority, SYS_setregid,
    SYS_setresgid, SYS_setresuid, SYS_setreuid, SYS_setrlimit, SYS_set_robust_list, SYS_setsid,
    SYS_setsockopt, SYS_set_tid_address, SYS_setuid, SYS_setxattr, SYS_shmat, SYS_shmctl, SYS_shmdt,
    SYS_shmget, SYS_shutdown, SYS_sigaltstack, SYS_signalfd4, SYS_socketpair, SYS_splice, SYS_statfs,
    N_statmount, SYS_statx, SYS_symlinkat, SYS_sync, SYS_sync_file_range, SYS_syncfs, SYS_sysinfo,
    SYS_tee, SYS_tgkill, SYS_timer_create, SYS_timer_delete, SYS_timerfd_create, SYS_timerfd_gettime,
    SYS_timerfd_settime, SYS_timer_getoverrun, SYS_timer_gettime, SYS_timer_settime, SYS_times,
    SYS_tkill, SYS_truncate, SYS_umask, SYS_uname, SYS_unlinkat, SYS_utimensat, SYS_vmsplice, SYS_wait4,
    SYS_waitid, SYS_write, SYS_writev,
#ifdef __x86_64__
    SYS_access, SYS_alarm, SYS_arch_prctl, SYS_chmod, SYS_chown, SYS_creat, SYS_dup2, SYS_epoll_create,
    SYS_epoll_ctl_old, SYS_epoll_wait, SYS_epoll_wait_old, SYS_eventfd, SYS_fork, SYS_futimesat,
    SYS_getdents, SYS_getpgrp, SYS_get_thread_area, SYS_inotify_init, SYS_lchown, SYS_link, SYS_lstat,
    SYS_mkdir, SYS_mknod, SYS_modify_ldt, SYS_open, SYS_pause, SYS_pipe, SYS_poll, SYS_readlink,
    SYS_rename, SYS_rmdir, SYS_select, SYS_set_thread_area, SYS_signalfd, SYS_stat, SYS_symlink,
    SYS_time, SYS_unlink, SYS_utime, SYS_utimes, SYS_vfork,
#endif
};

static const int kept_capabilities[] = {
    CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_NET_BIND_SERVICE, CAP_SETFCAP,
    CAP_SETGID, CAP_SETPCAP, CAP_SETUID, CAP_SYS_CHROOT,
};

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "no list of system calls for this architecture"
#endif

#define LOAD(offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset)
#define ARGUMENT(i) (offsetof(struct seccomp_data, args) + 8 * (i)) /* its low half, little-endian */
#define IF(op, value, yes, no) BPF_JUMP(BPF_JMP | BPF_##op | BPF_K, (unsigned)(value), yes, no)
#define REFUSE(error) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define SIZE(array) (sizeof(array) / sizeof *(array))
#define KVM_IOCTLS 0xae00
#define NO_IOCTLS 1 /* not a kind */
#define KINDS_OF_NAMESPACE 0x7e020000 /* CLONE_NEW* of clone(2) */

/* Calls that are allowed with some arguments only. */
static const struct sock_filter special[] = {
    LOAD(offsetof(struct seccomp_data, arch)),
    IF(JEQ, ARCHITECTURE, 1, 0),
    REFUSE(ENOSYS),
    LOAD(offsetof(struct seccomp_data, nr)),
    IF(JGT, N_LAST, 0, 1), /* x32, and calls that this list does not know: libraries fall back */
    REFUSE(ENOSYS),
    /* No namespaces: clone3 hides its flags from us, so it does not exist. */
    IF(JEQ, SYS_clone3, 0, 1),
    REFUSE(ENOSYS),
    IF(JEQ, SYS_clone, 0, 4),
    LOAD(ARGUMENT(0)),
    IF(JSET, KINDS_OF_NAMESPACE, 0, 1),
    REFUSE(EPERM),
    ALLOW,
    IF(JEQ, SYS_personality, 0, 5), /* the two usual ones, and to ask */
    LOAD(ARGUMENT(0)),
    IF(JEQ, 0xffffffff, 2, 0),
    IF(JEQ, 0, 1, 0),
    REFUSE(EPERM),
    ALLOW,
    /* What counts against the whole host: libraries fall back to threads. */
    IF(JEQ, SYS_io_setup, 0, 1),
    REFUSE(ENOSYS),
    /* The init has the user of the box's root, who could else take its files and its processor time. */
    IF(JEQ, SYS_prlimit64, 4, 0),
    IF(JEQ, SYS_sched_setaffinity, 3, 0),
    IF(JEQ, SYS_sched_setattr, 2, 0),
    IF(JEQ, SYS_sched_setparam, 1, 0),
    IF(JEQ, SYS_sched_setscheduler, 0, 4),
    LOAD(ARGUMENT(0)),
    IF(JEQ, 1, 0, 1),
    REFUSE(EPERM),
    ALLOW,
    /* The same by priorities: of it, and of all that a user has. */
    IF(JEQ, SYS_setpriority, 1, 0),
    IF(JEQ, SYS_ioprio_set, 0, 6),
    LOAD(ARGUMENT(0)),
    IF(JGE, 2, 2, 0),
    LOAD(ARGUMENT(1)),
    IF(JEQ, 1, 0, 1),
    REFUSE(EPERM),
    ALLOW,
    IF(JEQ, SYS_socketpair, 1, 0),
    IF(JEQ, SYS_socket, 0, 7), /* Unix, IPv4, IPv6, netlink */
    LOAD(ARGUMENT(0)),
    IF(JEQ, 1, 4, 0),
    IF(JEQ, 2, 3, 0),
    IF(JEQ, 10, 2, 0),
    IF(JEQ, 16, 1, 0),
    REFUSE(EAFNOSUPPORT),
    ALLOW,
    /* ioctls of file systems that change more than a file (extent swaps, quotas, resizing), and those
     * that type into a terminal. By the kind in the second byte. */
    IF(JEQ, SYS_ioctl, 0, 22),
    LOAD(ARGUMENT(1)),
    IF(JEQ, 0x5412, 18, 0), /* TIOCSTI */
    IF(JEQ, 0x541c, 17, 0), /* TIOCLINUX */
    IF(JEQ, 0x40049409, 17, 0), /* FICLONE */
    IF(JEQ, 0x4020940d, 16, 0), /* FICLONERANGE */
    IF(JEQ, 0xc0189436, 15, 0), /* FIDEDUPERANGE */
    IF(JEQ, 0x80086601, 14, 0), /* FS_IOC_GETFLAGS */
    IF(JEQ, 0x40086602, 13, 0), /* FS_IOC_SETFLAGS */
    IF(JEQ, 0xc020660b, 12, 0), /* FS_IOC_FIEMAP */
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xff00),
    IF(JEQ, 'X' << 8, 9, 0),  /* XFS, freeze, trim, project ids */
    IF(JEQ, 'f' << 8, 8, 0),  /* ext4, verity, encryption */
    IF(JEQ, 0x9400, 7, 0),    /* btrfs */
    IF(JEQ, 0xf500, 6, 0),    /* f2fs */
    IF(JEQ, 0xfd00, 5, 0),    /* device mapper */
    IF(JEQ, 'L' << 8, 4, 0),  /* loop */
    IF(JEQ, 0x1200, 3, 0),    /* block devices */
    IF(JEQ, KVM_IOCTLS, 2, 0), /* but for jails of machines: see install_filter */
    IF(JEQ, 'V' << 8, 1, 0),  /* virtual terminals */
    ALLOW,
    REFUSE(ENOTTY),
    ALLOW,
};

static void install_filter(struct launch *launch)
{
    static bool set[N_LAST + 2];
    static struct sock_filter code[SIZE(special) + 3 * SIZE(allowed) + 1];
    for (size_t i = 0; i < SIZE(allowed); i++)
        set[allowed[i]] = true;
    memcpy(code, special, sizeof special);
    for (size_t i = 0; i < SIZE(special); i++)
        if (special[i].code == (BPF_JMP | BPF_JEQ | BPF_K) && special[i].k == KVM_IOCTLS && has_device(launch, "kvm"))
            code[i].k = NO_IOCTLS;
    size_t n = SIZE(special);
    for (int first = 0; first <= N_LAST; first++) {
        if (!set[first])
            continue;
        int last = first;
        while (set[last + 1])
            last++;
        code[n++] = (struct sock_filter)IF(JGE, first, 0, 2);
        code[n++] = (struct sock_filter)IF(JGT, last, 1, 0);
        code[n++] = (struct sock_filter)ALLOW;
        first = last;
    }
    code[n++] = (struct sock_filter)REFUSE(EPERM);
    struct sock_fprog program = {.len = (unsigned short)n, .filter = code};
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program))
        launch_failed(launch, "seccomp");
}

void join_new_keyring(void)
{
    syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL); /* kernels without keys have none to leak */
}

void drop_privileges(struct launch *launch)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {0};
    for (size_t i = 0; i < SIZE(kept_capabilities); i++)
        data[0].permitted |= 1u << kept_capabilities[i];
    data[0].effective = data[0].permitted;
    if (setgroups(0, NULL) || setresgid(0, 0, 0) || setresuid(0, 0, 0))
        launch_failed(launch, "root of the box");
    for (int capability = 0; prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
        if (capability >= 32 || !(data[0].permitted >> capability & 1))
            if (prctl(PR_CAPBSET_DROP, capability))
                launch_failed(launch, "bounding set");
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) || syscall(SYS_capset, &header, data))
        launch_failed(launch, "capabilities");
    /* Nobody in the box may look into the init, or at the program that it runs. */
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_DUMPABLE, 0))
        launch_failed(launch, "no new privileges");
    umask(022);
    install_filter(launch);
}
