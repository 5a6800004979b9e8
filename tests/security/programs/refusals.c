/* Asks for everything that a box must not have, and prints what came of it: one "name=result" a line,
 * where the result is OK or the name of the error. Arguments are chosen so that a call that were allowed
 * would do no harm. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static void report(const char *name, long result)
{
    printf("%s=%s\n", name, result >= 0 ? "OK" : strerrorname_np(errno));
    fflush(stdout);
}

#define TRY(name, call) (errno = 0, report(name, (long)(call)))

static void mounts(void)
{
    TRY("mount", mount("none", "/tmp", "tmpfs", 0, NULL));
    TRY("mount bind", mount("/etc", "/tmp", NULL, MS_BIND, NULL));
    TRY("remount", mount(NULL, "/proc/sys", NULL, MS_REMOUNT | MS_BIND, NULL));
    TRY("umount", umount2("/proc/sys", MNT_DETACH));
    TRY("umount mask", umount2("/proc/kcore", MNT_DETACH));
    TRY("pivot_root", syscall(SYS_pivot_root, "/tmp", "/tmp"));
    TRY("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
    TRY("fspick", syscall(SYS_fspick, AT_FDCWD, "/", 0));
    TRY("fsmount", syscall(SYS_fsmount, 0, 0, 0));
    TRY("open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 0));
    TRY("open_tree clone", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
    TRY("move_mount", syscall(SYS_move_mount, AT_FDCWD, "/proc", AT_FDCWD, "/tmp", 0));
    TRY("mount_setattr", syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, NULL, 0));
    TRY("open_tree_attr", syscall(467, AT_FDCWD, "/", 0, NULL, 0));
    TRY("open_by_handle_at", syscall(SYS_open_by_handle_at, AT_FDCWD, NULL, 0));
    TRY("file_setattr", syscall(469, AT_FDCWD, "/", NULL, 0, 0));
}

static void namespaces(void)
{
    static const struct { const char *name; unsigned long flag; } kinds[] = {
        {"mnt", CLONE_NEWNS}, {"pid", CLONE_NEWPID}, {"uts", CLONE_NEWUTS}, {"ipc", CLONE_NEWIPC},
        {"net", CLONE_NEWNET}, {"user", CLONE_NEWUSER}, {"cgroup", CLONE_NEWCGROUP},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char name[64], path[64];
        snprintf(name, sizeof name, "unshare %s", kinds[i].name);
        TRY(name, unshare((int)kinds[i].flag));
        snprintf(name, sizeof name, "clone %s", kinds[i].name);
        long pid = syscall(SYS_clone, kinds[i].flag | SIGCHLD, NULL, NULL, NULL, NULL);
        if (pid == 0)
            _exit(0);
        report(name, pid);
        snprintf(name, sizeof name, "setns %s", kinds[i].name);
        snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i].name);
        int own = open(path, O_RDONLY);
        TRY(name, setns(own, 0));
        snprintf(name, sizeof name, "open ns/%s of init", kinds[i].name);
        snprintf(path, sizeof path, "/proc/1/ns/%s", kinds[i].name);
        TRY(name, open(path, O_RDONLY));
    }
    uint64_t arguments[11] = {CLONE_NEWUSER};
    TRY("clone3", syscall(SYS_clone3, arguments, sizeof arguments));
}

static void other_processes(void)
{
    char byte;
    struct iovec mine = {&byte, 1}, theirs = {(void *)0x400000, 1};
    TRY("ptrace init", ptrace(PTRACE_ATTACH, 1, NULL, NULL));
    TRY("seize init", ptrace(PTRACE_SEIZE, 1, NULL, NULL));
    TRY("process_vm_readv init", process_vm_readv(1, &mine, 1, &theirs, 1, 0));
    TRY("process_vm_writev init", process_vm_writev(1, &mine, 1, &theirs, 1, 0));
    int pidfd = (int)syscall(SYS_pidfd_open, 1, 0);
    TRY("pidfd_getfd init", syscall(SYS_pidfd_getfd, pidfd, 3, 0));
    TRY("kcmp", syscall(SYS_kcmp, 1, getpid(), 0, 0, 0));
    TRY("process_madvise", syscall(SYS_process_madvise, pidfd, &theirs, 1, 21, 0));
    TRY("move_pages", syscall(SYS_move_pages, 1, 0, NULL, NULL, NULL, 0));
    TRY("prlimit init", prlimit(1, RLIMIT_NOFILE, &(struct rlimit){1, 1}, NULL));
}

static void kernel(void)
{
    TRY("add_key", syscall(SYS_add_key, "user", "x", "y", 1, KEY_SPEC_PROCESS_KEYRING));
    TRY("request_key", syscall(SYS_request_key, "user", "x", NULL, 0));
    TRY("keyctl", syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0));
    TRY("bpf", syscall(SYS_bpf, 0, NULL, 0));
    TRY("perf_event_open", syscall(SYS_perf_event_open, NULL, 0, -1, -1, 0));
    TRY("userfaultfd", syscall(SYS_userfaultfd, 1));
    TRY("io_uring_setup", syscall(SYS_io_uring_setup, 1, NULL));
    TRY("io_uring_enter", syscall(SYS_io_uring_enter, 0, 0, 0, 0, NULL));
    TRY("io_uring_register", syscall(SYS_io_uring_register, 0, 0, NULL, 0));
    TRY("kexec_load", syscall(SYS_kexec_load, 0, 0, NULL, 0));
    TRY("kexec_file_load", syscall(SYS_kexec_file_load, -1, -1, 0, NULL, 0));
    TRY("init_module", syscall(SYS_init_module, "", 0, ""));
    TRY("finit_module", syscall(SYS_finit_module, -1, "", 0));
    TRY("delete_module", syscall(SYS_delete_module, "none", 0));
    TRY("syslog", syscall(SYS_syslog, 10, NULL, 0));
    TRY("swapon", swapon("/etc/hostname", 0));
    TRY("swapoff", swapoff("/etc/hostname"));
    TRY("reboot", reboot(RB_DISABLE_CAD));
    struct timeval now;
    struct timespec spec;
    gettimeofday(&now, NULL);
    TRY("settimeofday", settimeofday(&now, NULL));
    clock_gettime(CLOCK_REALTIME, &spec);
    TRY("clock_settime", clock_settime(CLOCK_REALTIME, &spec));
    struct timex change = {.modes = ADJ_STATUS, .status = STA_UNSYNC};
    TRY("adjtimex", adjtimex(&change));
    TRY("clock_adjtime", clock_adjtime(CLOCK_REALTIME, &change));
    TRY("sethostname", sethostname("other", 5));
    TRY("setdomainname", setdomainname("other", 5));
    TRY("quotactl", syscall(SYS_quotactl, 0, NULL, 0, NULL));
    TRY("acct", acct(NULL));
    TRY("fanotify_init", syscall(SYS_fanotify_init, 0, 0));
    TRY("vhangup", vhangup());
    TRY("lookup_dcookie", syscall(212, 0, NULL, 0));
    TRY("personality", personality(READ_IMPLIES_EXEC));
    TRY("personality no randomization", personality(ADDR_NO_RANDOMIZE));
    TRY("io_setup", syscall(SYS_io_setup, 16, &(unsigned long){0}));
#ifdef __x86_64__
    TRY("iopl", iopl(3));
    TRY("ioperm", ioperm(0x80, 1, 1));
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20) : "memory"); /* getpid of i386 */
    errno = (int)-result;
    report("32-bit call", result < 0 ? -1 : result);
    TRY("x32 call", syscall(0x40000000 + SYS_getpid));
#endif
    TRY("real-time scheduling", sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){1}));
    TRY("nice", setpriority(PRIO_PROCESS, 0, -10));
    TRY("nice init", setpriority(PRIO_PROCESS, 1, 19));
    TRY("nice init by group", setpriority(PRIO_PGRP, 1, 19));
    TRY("nice init by user", setpriority(PRIO_USER, 0, 19));
    TRY("ionice init", syscall(SYS_ioprio_set, 1, 1, 3 << 13));
    TRY("ionice init by user", syscall(SYS_ioprio_set, 3, 0, 3 << 13));
    TRY("more open files", setrlimit(RLIMIT_NOFILE, &(struct rlimit){1 << 20, 1 << 20}));
    TRY("more locked memory", setrlimit(RLIMIT_MEMLOCK, &(struct rlimit){1 << 30, 1 << 30}));
    TRY("core dumps", setrlimit(RLIMIT_CORE, &(struct rlimit){1 << 20, 1 << 20}));
}

static void sockets(void)
{
    static const struct { const char *name; int family, type, protocol; } kinds[] = {
        {"AF_PACKET", 17, SOCK_RAW, 0}, {"AF_PACKET dgram", 17, SOCK_DGRAM, 0}, {"AF_VSOCK", 40, SOCK_STREAM, 0},
        {"AF_ALG", 38, SOCK_SEQPACKET, 0}, {"AF_KEY", 15, SOCK_RAW, 2}, {"AF_TIPC", 30, SOCK_STREAM, 0},
        {"AF_RDS", 21, SOCK_SEQPACKET, 0}, {"AF_CAN", 29, SOCK_RAW, 1}, {"AF_BLUETOOTH", 31, SOCK_RAW, 0},
        {"AF_XDP", 44, SOCK_RAW, 0}, {"AF_SMC", 43, SOCK_STREAM, 0}, {"AF_APPLETALK", 5, SOCK_DGRAM, 0},
        {"raw IPv4", AF_INET, SOCK_RAW, 1}, {"raw IPv6", AF_INET6, SOCK_RAW, 58},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        TRY(kinds[i].name, socket(kinds[i].family, kinds[i].type, kinds[i].protocol));
    int pair[2];
    TRY("socketpair AF_TIPC", socketpair(30, SOCK_STREAM, 0, pair));
}

static void files(void)
{
    TRY("mknod char", mknod("/tmp/char", S_IFCHR | 0666, makedev(1, 5)));
    TRY("mknod block", mknod("/tmp/block", S_IFBLK | 0666, makedev(254, 0)));
    TRY("mknod in /dev", mknod("/dev/kmem", S_IFCHR | 0666, makedev(1, 2)));
    TRY("mknod in /dev/shm", mknod("/dev/shm/mem", S_IFCHR | 0666, makedev(1, 1)));
    TRY("whiteout", mknod("/tmp/whiteout", S_IFCHR, makedev(0, 0)));
    mkdir("/tmp/opaque", 0755);
    TRY("trusted xattr", setxattr("/tmp/opaque", "trusted.overlay.opaque", "y", 1, 0));
    TRY("redirect xattr", setxattr("/tmp/opaque", "trusted.overlay.redirect", "/etc", 4, 0));
    int file = open("/tmp/file", O_RDWR | O_CREAT, 0600), directory = open("/tmp", O_RDONLY);
    char arguments[256] = {0};
    TRY("FIFREEZE", ioctl(directory, 0xc0045877, 0));
    TRY("FITRIM", ioctl(directory, 0xc0185879, arguments));
    TRY("XFS_IOC_SWAPEXT", ioctl(file, 0xc0c0586d, arguments));
    TRY("XFS_IOC_EXCHANGE_RANGE", ioctl(file, 0x40285881, arguments));
    TRY("EXT4_IOC_MOVE_EXT", ioctl(file, 0xc028660f, arguments));
    TRY("EXT4_IOC_SWAP_BOOT", ioctl(file, 0x6611, arguments));
    TRY("FS_IOC_FSSETXATTR", ioctl(file, 0x401c5820, arguments));
    TRY("BLKDISCARD", ioctl(file, 0x1277, arguments));
    TRY("BTRFS_IOC_SNAP_CREATE", ioctl(directory, 0x50009401, arguments));
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY), slave = -1, zero = 0;
    char name[32];
    unsigned number = 0;
    if (master >= 0 && !ioctl(master, TIOCSPTLCK, &zero) && !ioctl(master, TIOCGPTN, &number)) {
        snprintf(name, sizeof name, "/dev/pts/%u", number);
        slave = open(name, O_RDWR | O_NOCTTY);
    }
    TRY("TIOCSTI", ioctl(slave, TIOCSTI, "x"));
    TRY("TIOCLINUX", ioctl(slave, TIOCLINUX, &zero));
    TRY("TIOCCONS", ioctl(slave, TIOCCONS, 0));
}

int main(void)
{
    mounts();
    namespaces();
    other_processes();
    kernel();
    sockets();
    files();
    return 0;
}
