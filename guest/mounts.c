/* The file system of a box. Everything is mounted in the box's own mount namespace (mounts in the
 * host's make every later box slower to start), and every target is looked up inside the new root, so
 * that a link in a hostile image leads nowhere else. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "launch.h"

/* <sys/mount.h> clashes with <linux/mount.h>. */
int mount(const char *, const char *, const char *, unsigned long, const void *);
int umount2(const char *, int);
#define DETACH 2 /* MNT_DETACH */

static int root = -1, users = -1;
static struct launch *box;

/* Files on mounts with mapped ids belong to the box's users: the host's root has no id there and cannot
 * make any. Capabilities of a root of files go with the id and are taken back. */
static void act_as(uint64_t id)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    setfsgid((gid_t)id);
    setfsuid((uid_t)id);
    if (syscall(SYS_capget, &header, data))
        launch_failed(box, "capget");
    for (int i = 0; i < 2; i++)
        data[i].effective = data[i].permitted;
    if (syscall(SYS_capset, &header, data))
        launch_failed(box, "capset");
}

static int open_in_root(const char *path, uint64_t flags)
{
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

/* Make a directory and those above it, as the box's root. */
static void make_directories(const char *path)
{
    char *prefix = strdup(path);
    act_as(box->uid_base);
    for (char *slash = prefix; slash; ) {
        slash = strchr(slash + 1, '/');
        if (slash)
            *slash = 0;
        int there = open_in_root(prefix, O_PATH);
        if (there < 0 && errno == ENOENT) {
            char *name = strrchr(prefix, '/');
            int parent;
            if (name && name != prefix) {
                *name = 0;
                parent = open_in_root(prefix, O_PATH | O_DIRECTORY);
                *name++ = '/';
            } else {
                parent = dup(root);
                name = name ? name + 1 : prefix;
            }
            if (parent < 0 || mkdirat(parent, name, 0755))
                launch_failed(box, path);
            close(parent);
        } else if (there < 0) {
            launch_failed(box, path);
        } else {
            close(there);
        }
        if (slash)
            *slash = '/';
    }
    act_as(0);
    free(prefix);
}

/* Make an empty file for a file to be mounted on, and the directories above it. */
static void make_file(const char *path)
{
    char *folder = strdup(path), *name = strrchr(folder, '/');
    int parent = -1, file = -1;
    if (name && name != folder) {
        *name++ = 0;
        make_directories(folder);
        parent = open_in_root(folder, O_PATH | O_DIRECTORY);
    } else {
        parent = dup(root);
        name = name ? name + 1 : folder;
    }
    act_as(box->uid_base);
    if (parent >= 0)
        file = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (file < 0)
        launch_failed(box, path);
    act_as(0);
    close(file);
    close(parent);
    free(folder);
}

static void attach(int mount_fd, const char *target, bool make)
{
    struct stat status;
    int at = open_in_root(target, O_PATH);
    if (at < 0 && errno == ENOENT && make) {
        if (fstat(mount_fd, &status))
            launch_failed(box, target);
        if (S_ISDIR(status.st_mode))
            make_directories(target);
        else
            make_file(target);
        at = open_in_root(target, O_PATH);
    }
    if (at < 0 || syscall(SYS_move_mount, mount_fd, "", at, "",
                          MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH))
        launch_failed(box, target);
    close(at);
    close(mount_fd);
}

static int new_mount(const char *type, uint64_t attributes, const char *const *options)
{
    int fs = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
    if (fs < 0)
        launch_failed(box, type);
    for (; *options; options += 2)
        if (syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, options[0], options[1], 0))
            launch_failed(box, options[0]);
    int fd = -1;
    if (syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) ||
        (fd = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, attributes)) < 0)
        launch_failed(box, type);
    close(fs);
    return fd;
}

static void set_attributes(int fd, uint64_t set, bool map_ids, const char *what)
{
    struct mount_attr attr = {.attr_set = set};
    if (map_ids && users >= 0) {
        attr.attr_set |= MOUNT_ATTR_IDMAP;
        attr.userns_fd = (unsigned)users;
    }
    if (attr.attr_set && syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH, &attr, sizeof attr))
        launch_failed(box, what);
}

static int clone_mount(int directory, const char *path)
{
    int fd = (int)syscall(SYS_open_tree, directory, path,
                          OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (*path ? 0 : AT_EMPTY_PATH));
    if (fd < 0)
        launch_failed(box, path);
    return fd;
}

static void place(int mount_fd, const char *target)
{
    if (mkdir(target, 0700) ||
        syscall(SYS_move_mount, mount_fd, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH))
        launch_failed(box, target);
    close(mount_fd);
}

static int open_scratch(void)
{
    if (box->scratch_fd >= 0)
        return box->scratch_fd;
    if (box->scratch)
        return clone_mount(AT_FDCWD, box->scratch);
    char size[32], inodes[32];
    snprintf(size, sizeof size, "%llu", (unsigned long long)box->scratch_bytes);
    snprintf(inodes, sizeof inodes, "%llu", (unsigned long long)box->scratch_inodes);
    const char *options[] = {"size", size, "nr_inodes", inodes, "mode", "0755", NULL};
    return new_mount("tmpfs", MOUNT_ATTR_NODEV, options);
}

/* Layers, the writable directory on top of them, and the overlay of both, in the staging directory. */
static void mount_overlay(void)
{
    int layers[MANY], scratch = open_scratch();
    for (int i = 0; i < box->lowers.count; i++) {
        layers[i] = clone_mount(AT_FDCWD, box->lowers.items[i]);
        set_attributes(layers[i], MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV, true, box->lowers.items[i]);
    }
    set_attributes(scratch, MOUNT_ATTR_NODEV, true, "scratch");
    if (mount("tmpfs", box->run_directory, "tmpfs", 0, "size=64k,mode=0755") ||
        chdir(box->run_directory))
        launch_failed(box, box->run_directory);
    struct bytes options = {0};
    bytes_add(&options, "lowerdir=", 9);
    for (int i = 0; i < box->lowers.count; i++) {
        char name[16];
        snprintf(name, sizeof name, "l%d", i);
        place(layers[i], name);
        if (i)
            bytes_add(&options, ":", 1);
        bytes_add(&options, name, strlen(name));
    }
    place(scratch, "rw");
    /* Layers and scratch are different file systems. With xino all files have one device number, as on a
     * disk: else `du -x` leaves out what its directory does not share its device with. */
    static const char rest[] = ",upperdir=rw/upper,workdir=rw/work,xino=on,index=off,metacopy=off";
    bytes_add(&options, rest, sizeof rest - 1);
    if (box->volatile_overlay)
        bytes_add(&options, ",volatile", 9);
    bytes_add(&options, "", 1);
    if (mkdir("root", 0755))
        launch_failed(box, "root");
    act_as(box->uid_base); /* what the overlay does below, it does as whoever mounts it */
    if ((mkdir("rw/upper", 0755) && errno != EEXIST) || (mkdir("rw/work", 0700) && errno != EEXIST))
        launch_failed(box, "upper and work");
    if (mount("overlay", "root", "overlay", 0, options.data))
        launch_failed(box, (char *)options.data);
    act_as(0);
    bytes_free(&options);
    root = open("root", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        launch_failed(box, "root");
    /* Nothing can gain privileges in a box anyway; without nosuid the kernel refuses to run programs
     * with more capabilities in their file than a box has, such as Debian's ping, which needs none here. */
    set_attributes(root, MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID, false, "root");
}

/* Give the root directory of a mount to the box's root: to the kernel, files of root in a directory of
 * somebody else's that all may write are a trap, and shared memory is not opened with O_CREAT. */
static int give_to_root(int mount_fd, const char *what)
{
    if (fchownat(mount_fd, "", (uid_t)box->uid_base, (gid_t)box->uid_base, AT_EMPTY_PATH))
        launch_failed(box, what);
    return mount_fd;
}

static void make_devices(void)
{
    static const struct { const char *name; int major, minor; bool asked; } nodes[] = {
        {"null", 1, 3, false}, {"zero", 1, 5, false}, {"full", 1, 7, false}, {"random", 1, 8, false},
        {"urandom", 1, 9, false}, {"tty", 5, 0, false}, {"kvm", 10, 232, true}, {"net/tun", 10, 200, true},
    };
    static const char *const links[][2] = {
        {"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
        {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}, {"/proc/kcore", "core"},
    };
    char owner[32], terminal_group[32], shared[32];
    snprintf(owner, sizeof owner, "%llu", (unsigned long long)box->uid_base);
    snprintf(terminal_group, sizeof terminal_group, "%llu", (unsigned long long)box->uid_base + 5);
    snprintf(shared, sizeof shared, "%llu",
             (unsigned long long)(box->shm_bytes ? box->shm_bytes : 64u << 20));
    const char *dev[] = {"size", "1m", "nr_inodes", "1k", "mode", "0755", "uid", owner, "gid", owner, NULL};
    const char *pts[] = {"ptmxmode", "0666", "mode", "0620", "gid", terminal_group, "max", "512", NULL};
    const char *shm[] = {"size", shared, "mode", "1777", "nr_inodes", "64k", NULL};
    attach(new_mount("tmpfs", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, dev), "dev", true);
    int directory = open_in_root("dev", O_RDONLY | O_DIRECTORY);
    if (directory < 0)
        launch_failed(box, "/dev");
    act_as(box->uid_base);
    if (has_device(box, "net/tun") && mkdirat(directory, "net", 0755))
        launch_failed(box, "/dev/net");
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        if (nodes[i].asked && !has_device(box, nodes[i].name))
            continue;
        if (mknodat(directory, nodes[i].name, S_IFCHR | 0666,
                    makedev((unsigned)nodes[i].major, (unsigned)nodes[i].minor)) ||
            fchmodat(directory, nodes[i].name, 0666, 0))
            launch_failed(box, nodes[i].name);
    }
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlinkat(links[i][0], directory, links[i][1]))
            launch_failed(box, links[i][1]);
    if (mkdirat(directory, "pts", 0755) || mkdirat(directory, "shm", 01777) ||
        mkdirat(directory, "mqueue", 01777))
        launch_failed(box, "/dev");
    act_as(0);
    close(directory);
    int terminals = new_mount("devpts", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, pts);
    attach(give_to_root(terminals, "devpts"), "dev/pts", false);
    uint64_t plain = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NODEV;
    attach(give_to_root(new_mount("tmpfs", plain, shm), "shm"), "dev/shm", false);
}

/* Ports below 1024 and ping need no privilege in a network of one's own. */
static void set_network_sysctls(void)
{
    static const char *const values[][2] = {
        {"proc/sys/net/ipv4/ip_unprivileged_port_start", "0"},
        {"proc/sys/net/ipv4/ping_group_range", "0 2147483647"},
    };
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        int fd = open_in_root(values[i][0], O_WRONLY);
        if (fd < 0 || write(fd, values[i][1], strlen(values[i][1])) < 0)
            launch_failed(box, values[i][0]);
        close(fd);
    }
}

static void hide(void)
{
    static const char *const masked[] = {
        "proc/acpi", "proc/asound", "proc/interrupts", "proc/kcore", "proc/keys", "proc/key-users",
        "proc/kmsg", "proc/kallsyms", "proc/latency_stats", "proc/modules", "proc/sched_debug",
        "proc/scsi", "proc/slabinfo", "proc/sysrq-trigger", "proc/timer_list", "proc/timer_stats",
        "proc/vmallocinfo", "proc/config.gz", "proc/driver", "sys/firmware", "sys/module", "sys/power",
        "sys/kernel/boot_params", "sys/kernel/slab", "sys/devices/virtual/powercap",
        "sys/devices/virtual/dmi",
    };
    static const char *const read_only[] = {"proc/bus", "proc/fs", "proc/irq", "proc/sys"};
    const char *none[] = {"size", "4k", "nr_inodes", "2", "mode", "0555", NULL};
    uint64_t plain = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY;
    int empty = new_mount("tmpfs", plain, none);
    int null = open_in_root("dev/null", O_PATH);
    for (size_t i = 0; i < sizeof masked / sizeof *masked; i++) {
        struct stat status;
        int at = open_in_root(masked[i], O_PATH | O_NOFOLLOW);
        if (at < 0 && errno == ENOENT)
            continue;
        if (at < 0 || fstat(at, &status))
            launch_failed(box, masked[i]);
        int cover = clone_mount(S_ISDIR(status.st_mode) ? empty : null, "");
        close(at);
        attach(cover, masked[i], false);
    }
    close(empty);
    close(null);
    for (size_t i = 0; i < sizeof read_only / sizeof *read_only; i++) {
        int at = open_in_root(read_only[i], O_PATH);
        if (at < 0)
            continue; /* not in this kernel */
        int same = clone_mount(at, "");
        set_attributes(same, plain, false, read_only[i]);
        close(at);
        attach(same, read_only[i], false);
    }
}

/* The three texts of a field: text, zero byte, text, zero byte, text. */
static const char *part(const struct list *list, int item, int index)
{
    const char *text = list->items[item], *end = text + list->sizes[item];
    while (index-- && text < end)
        text += strlen(text) + 1;
    return text <= end ? text : "";
}

static void attach_wanted(const int *sources)
{
    for (int i = 0; i < box->tmpfs.count; i++) {
        char owner[32];
        snprintf(owner, sizeof owner, "%llu", (unsigned long long)box->uid_base);
        const char *options[] = {"size", part(&box->tmpfs, i, 1), "mode", "1777", "uid", owner,
                                 "gid", owner, NULL};
        attach(new_mount("tmpfs", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, options),
               part(&box->tmpfs, i, 0), true);
    }
    for (int i = 0; i < box->binds.count; i++) {
        bool fixed = strcmp(part(&box->binds, i, 2), "rw") != 0;
        set_attributes(sources[i], MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (fixed ? MOUNT_ATTR_RDONLY : 0),
                       true, box->binds.items[i]);
        attach(sources[i], part(&box->binds, i, 1), true);
    }
}

static void write_files(void)
{
    make_directories("etc");
    act_as(box->uid_base);
    int etc = open_in_root("etc", O_RDONLY | O_DIRECTORY);
    for (int i = 0; i < box->files.count; i++) {
        const char *name = box->files.items[i], *content = part(&box->files, i, 1);
        size_t size = box->files.sizes[i] - (size_t)(content - name);
        unlinkat(etc, name, 0); /* it may be a link */
        int fd = openat(etc, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
        if (fd < 0 || write(fd, content, size) != (ssize_t)size)
            launch_failed(box, name);
        close(fd);
    }
    close(etc);
    act_as(0);
}

void build_root(struct launch *launch, int user_namespace)
{
    int sources[MANY];
    box = launch;
    users = user_namespace;
    box->phase = "mount";
    if (mount(NULL, "/", NULL, 1ul << 14 | 1ul << 18, NULL)) /* MS_REC | MS_PRIVATE */
        launch_failed(box, "make mounts private");
    for (int i = 0; i < box->binds.count; i++)
        sources[i] = clone_mount(AT_FDCWD, box->binds.items[i]);
    mount_overlay();
    make_devices();
    uint64_t plain = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NODEV;
    const char *none[] = {NULL};
    attach(new_mount("proc", plain, none), "proc", true);
    set_network_sysctls();
    attach(give_to_root(new_mount("mqueue", plain, none), "mqueue"), "dev/mqueue", false);
    attach(new_mount("sysfs", plain | MOUNT_ATTR_RDONLY, none), "sys", true);
    hide();
    if (box->files.count)
        write_files();
    attach_wanted(sources);
    if (box->read_only)
        set_attributes(root, MOUNT_ATTR_RDONLY, false, "read-only root");
}

void enter_root(struct launch *launch)
{
    launch->phase = "root";
    if (fchdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", DETACH) || chdir("/"))
        launch_failed(launch, "pivot_root");
    close(root);
}

