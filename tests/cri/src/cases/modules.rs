//! Modules of the kernel: they come when a container uses what they are for, and for nobody else.

use std::path::Path;

use anyhow::{Result, bail};
use brig_tests::node::check::{contains, equal, that};

use crate::container::Container;
use crate::node::{self, TOOLS};
use crate::pod::Pod;
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "modules",
        "what a privileged container uses is loaded when it does",
        uses,
    ),
    case(
        "modules",
        "a container without capabilities loads what it would on a node, and no more",
        unprivileged,
    ),
    case(
        "modules",
        "hostPath /lib/modules, read-only: modprobe finds the modules of the kernel that the container runs on",
        host_path,
    ),
];

/// Something that containers do, which ends well, and the module that is there afterwards; of an empty one the kernel has it
/// built in.
struct Use {
    module: &'static str,
    script: &'static str,
}

const fn using(module: &'static str, script: &'static str) -> Use {
    Use { module, script }
}

/// With /image: made by the first command, mounted, written, and read after a second mount.
macro_rules! file_system {
    ($type:literal, $make:literal) => {
        using(
            $type,
            concat!(
                "rm -f /image; mkdir -p /source /target; echo content > /source/file; ",
                $make,
                "; mount -o loop -t ",
                $type,
                " /image /target; test -e /target/file || cp /source/file /target/; umount /target; mount -o loop -t ",
                $type,
                " /image /target; grep content /target/file; umount /target; rm /image"
            ),
        )
    };
}

/// An interface of a type.
macro_rules! interface {
    ($module:literal, $arguments:literal) => {
        using(
            $module,
            concat!("ip link add x0 ", $arguments, "; ip link del x0"),
        )
    };
}

const USES: &[Use] = &[
    using(
        "wireguard",
        "ip link add wg0 type wireguard; wg genkey > /key; wg set wg0 private-key /key listen-port 5555
         wg show wg0 listen-port | grep 5555; ip link del wg0",
    ),
    using(
        "esp4",
        "ip xfrm state add src 10.9.0.1 dst 10.9.0.2 proto esp spi 1 mode transport \\
            enc 'cbc(aes)' 0x00112233445566778899aabbccddeeff auth 'hmac(sha256)' 0x$(head -c 32 /dev/zero | od -An -v -tx1 | tr -d ' \\n')
         ip xfrm state | grep esp; ip xfrm state flush",
    ),
    using(
        "ip_vs_rr",
        "ipvsadm -A -t 10.9.0.1:80 -s rr; ipvsadm -Ln | grep rr; ipvsadm -C",
    ),
    using(
        "xt_set",
        "ipset create s hash:ip; ipset add s 10.9.0.1; iptables -A INPUT -m set --match-set s src -j ACCEPT
         iptables -S INPUT | grep 'match-set s src'; iptables -F INPUT; ipset destroy s",
    ),
    using(
        "nft_flow_offload",
        "nft 'table inet f { flowtable t { hook ingress priority 0; devices = { lo }; };
            chain c { type filter hook forward priority 0; ip protocol tcp flow add @t; }; }'
         nft list ruleset | grep 'flow add @t'; nft delete table inet f",
    ),
    using(
        "",
        "nft 'table ip n { chain c { log prefix \"x\" group 3; numgen random mod 2 vmap { 0 : accept, 1 : drop };
            jhash ip saddr mod 4 seed 0x1 vmap { 0 : accept }; queue to 7; }; }'; nft list ruleset | grep numgen; nft delete table ip n",
    ),
    using(
        "",
        "iptables -A INPUT -m hashlimit --hashlimit-upto 5/s --hashlimit-name h -m string --string x --algo bm -j LOG
         iptables -A INPUT -m physdev --physdev-in x -j NFLOG; iptables -F INPUT",
    ),
    using(
        "xt_policy",
        "iptables -A INPUT -m policy --dir in --pol ipsec -j ACCEPT; iptables -F INPUT",
    ),
    using(
        "nft_meta_bridge",
        "nft 'table bridge b { chain c { meta ibrname \"x\" accept; }; }'; nft list ruleset | grep ibrname; nft delete table bridge b",
    ),
    using(
        "sctp",
        "python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132); s.bind((\"127.0.0.1\", 0)); s.listen()'",
    ),
    using(
        "",
        "python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262); s.bind((\"127.0.0.1\", 0)); s.listen()'",
    ),
    using("", "python3 -c 'import socket; socket.socket(44, socket.SOCK_RAW)'"),
    using(
        "tls",
        "python3 -c 'import socket
l = socket.create_server((\"127.0.0.1\", 0)); c = socket.create_connection(l.getsockname()); c.setsockopt(6, 31, b\"tls\")'",
    ),
    using(
        "tcp_htcp",
        "python3 -c 'import socket; socket.socket().setsockopt(6, 13, b\"htcp\")'",
    ),
    interface!("ip_gre", "type gre local 127.0.0.1 remote 127.0.0.2"),
    interface!("ipip", "type ipip local 127.0.0.1 remote 127.0.0.2"),
    interface!("sit", "type sit local 127.0.0.1 remote 127.0.0.2"),
    interface!("ip6_tunnel", "type ip6tnl local ::1 remote ::2"),
    interface!("geneve", "type geneve id 1 remote 127.0.0.2"),
    interface!("bonding", "type bond"),
    interface!("vrf", "type vrf table 10"),
    interface!("ifb", "type ifb"),
    using(
        "macsec",
        "ip link add d0 type dummy; ip link add x0 link d0 type macsec; ip link del x0; ip link del d0",
    ),
    using("sch_cake", "tc qdisc add dev lo root cake; tc qdisc show dev lo | grep cake; tc qdisc del dev lo root"),
    using(
        "cls_flower",
        "tc qdisc add dev lo clsact; tc filter add dev lo ingress protocol ip flower dst_ip 10.9.0.1 action drop
         tc filter show dev lo ingress | grep flower; tc qdisc del dev lo clsact",
    ),
    using(
        "dm_crypt",
        "truncate -s 1M /image; d=$(losetup -f --show /image)
         echo 0 2048 crypt aes-xts-plain64 $(head -c 64 /dev/zero | od -An -v -tx1 | tr -d ' \\n') 0 $d 0 | dmsetup create --noudevsync c
         dmsetup table c | grep crypt; dmsetup remove --noudevsync c; losetup -d $d; rm /image",
    ),
    using("cuse", "test -c /dev/cuse || mknod /dev/cuse c 10 203; : < /dev/cuse"),
    file_system!("xfs", "truncate -s 320M /image; mkfs.xfs -q /image"),
    file_system!("btrfs", "truncate -s 128M /image; mkfs.btrfs -q /image"),
    file_system!("squashfs", "mksquashfs /source /image -quiet -no-progress -comp zstd"),
    file_system!("vfat", "truncate -s 4M /image; mkfs.vfat /image"),
    using(
        "nfsv4",
        "mkdir -p /target; mount -i -t nfs4 -o vers=4.2,soft,retrans=0,timeo=10,addr=127.0.0.1,clientaddr=127.0.0.1 127.0.0.1:/ /target 2>/dev/null || true
         grep nfs4 /proc/filesystems",
    ),
    using(
        "cifs",
        "mkdir -p /target; mount -i -t cifs -o ip=127.0.0.1,username=x,password=x //127.0.0.1/x /target 2>/dev/null || true
         grep cifs /proc/filesystems",
    ),
];

fn start(suite: &mut Suite, name: &str, privileged: bool) -> Result<(Pod, Container)> {
    suite.image(TOOLS)?;
    let pod = suite
        .pod(name)
        .security(|security| security.privileged = privileged)
        .run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .image(TOOLS.0)
        .security(|security| security.privileged = privileged)
        .start()?;
    Ok((pod, container))
}

fn loaded(container: &Container) -> Result<Vec<String>> {
    let text = container.sh("cut -d' ' -f1 /proc/modules")?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn uses(suite: &mut Suite) -> Result<()> {
    let (_pod, container) = start(suite, "modules", true)?;
    if suite.is_brig() {
        equal(
            "modules of an idle pod",
            Vec::<String>::new(),
            loaded(&container)?,
        )?;
        container.sh("python3 -c 'import gzip; assert b\"CONFIG_MODULES=y\" in gzip.open(\"/proc/config.gz\").read()'")?;
    }
    let mut failed = Vec::new();
    for Use { module, script } in USES {
        // The node's kernel is built of modules, of which its image lacks some.
        if !suite.is_brig() && !module.is_empty() && node::run("modinfo", &["-n", module]).is_err()
        {
            continue;
        }
        let result = container.sh(&format!("set -e; {script}"));
        let there = module.is_empty() || loaded(&container)?.iter().any(|name| name == module);
        match result {
            Err(error) => failed.push(format!("{module}: {script}: {error:#}")),
            Ok(_) if !there => failed.push(format!("{module} is not loaded after {script}")),
            Ok(_) => {}
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    let log = container.sh("dmesg | grep brig-agent || true")?;
    bail!("{}\nthe kernel's log: {log}", failed.join("\n"))
}

fn unprivileged(suite: &mut Suite) -> Result<()> {
    let (_pod, container) = start(suite, "modules-unprivileged", false)?;
    let refused = |script: &str, word: &str| -> Result<()> {
        contains(script, word, &container.sh_fails(script)?)
    };
    // By a socket's protocol, anybody.
    container
        .sh("python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)'")?;
    contains("modules", "sctp", &loaded(&container)?.join(" "))?;
    // By the type of an interface or of a file system, by its own name, or as a file: who administers the kernel.
    refused("ip link add wg0 type wireguard", "not permitted")?;
    refused("mount -t xfs /dev/zero /mnt", "ermi")?;
    refused(
        "python3 -c 'import ctypes, os; c = ctypes.CDLL(None, use_errno=True)
r = c.syscall(313, 0, b\"\", 0); exit(r and os.strerror(ctypes.get_errno()))'",
        "not permitted",
    )?;
    if suite.is_brig() {
        let names = loaded(&container)?;
        for name in ["wireguard", "xfs"] {
            if names.iter().any(|loaded| loaded == name) {
                bail!("{name} was loaded for a container that may not use it: {names:?}");
            }
        }
    }
    Ok(())
}

fn host_path(suite: &mut Suite) -> Result<()> {
    suite.image(TOOLS)?;
    let pod = suite
        .pod("modules-path")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let modules = Path::new("/lib/modules");
    let container = pod
        .container("main", SLEEP)
        .image(TOOLS.0)
        .security(|security| security.privileged = true)
        .mount_readonly(modules, "/lib/modules")
        .start()?;
    container.sh("modprobe nbd && test -d /sys/block/nbd0 && modprobe macvlan")?;
    contains("modules", "macvlan", &loaded(&container)?.join(" "))?;
    let mut expected: Vec<String> = std::fs::read_dir(modules)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()?;
    if suite.is_brig() {
        expected.push(container.sh("uname -r")?);
    }
    expected.sort();
    let found = container.sh("ls /lib/modules | LC_ALL=C sort")?;
    equal("directories", expected.join("\n"), found)?;
    container.sh_fails("touch /lib/modules/x").map(drop)?;
    // Signed or not, only what this kernel's build has made: a module's end is its signature.
    if suite.is_brig() {
        let script = "f=$(modinfo -n sctp); head -c -100 $f > /m.ko; insmod /m.ko 2>&1 || true; grep -c ^sctp /proc/modules || true";
        let refused = container.sh(script)?;
        that(
            &format!("an unsigned module is refused: {refused}"),
            refused.ends_with('0'),
        )?;
    }
    Ok(())
}
