//! What a sandbox is given at its start: names, network, shared memory; and its streams.
#![allow(clippy::unwrap_used)]
mod guest;

use brig_agent_protocol::{LOG_STREAM, agent::*};
use guest::*;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use ttrpc::Code;

const MAC: &str = "02:00:00:0a:0b:0c";

fn request() -> StartSandboxRequest {
    StartSandboxRequest {
        id: "sandbox".into(),
        hostname: "web-0".into(),
        interfaces: vec![Interface {
            name: "eth0".into(),
            mac: MAC.into(),
            mtu: 1400,
            addresses: vec![address("10.88.0.7/24"), address("fd00:88::7/64")],
            ..Default::default()
        }],
        routes: vec![
            // In the wrong order: the gateway's own route comes last.
            Route {
                gateway: "169.254.1.1".into(),
                interface: "eth0".into(),
                ..Default::default()
            },
            Route {
                gateway: "fd00:88::1".into(),
                interface: "eth0".into(),
                ..Default::default()
            },
            Route {
                destination: "fd00:88::/64".into(),
                interface: "eth0".into(),
                ..Default::default()
            },
            Route {
                destination: "169.254.1.1/32".into(),
                interface: "eth0".into(),
                scope: 253,
                ..Default::default()
            },
        ],
        neighbours: vec![Neighbour {
            address: "169.254.1.1".into(),
            mac: "02:00:00:00:00:01".into(),
            interface: "eth0".into(),
            ..Default::default()
        }],
        sysctls: [(
            "net.ipv4.ip_unprivileged_port_start".to_owned(),
            "7".to_owned(),
        )]
        .into(),
        shm_size: 1 << 20,
        ..Default::default()
    }
}

#[tokio::test]
async fn the_network_is_as_the_host_described_it() {
    let mut guest = Guest::boot().await;
    guest.in_network(&format!(
        "ip link add v0 type veth peer name v1 && ip link set v0 address {MAC} && ip link set v1 up"
    ));
    guest.client.start_sandbox(ctx(), &request()).await.unwrap();
    let link = guest.in_network("ip -o link show eth0");
    assert!(
        link.contains("mtu 1400") && link.contains(MAC) && link.contains("UP"),
        "{link}"
    );
    let addresses = guest.in_network("ip -o addr show eth0");
    assert!(addresses.contains("10.88.0.7/24"), "{addresses}");
    let v6 = addresses
        .lines()
        .find(|l| l.contains("fd00:88::7/64"))
        .unwrap();
    assert!(!v6.contains("tentative") && v6.contains("nodad"), "{v6}");
    let routes = guest.in_network("ip route; ip -6 route");
    for route in [
        "default via 169.254.1.1 dev eth0",
        "169.254.1.1 dev eth0",
        "default via fd00:88::1 dev eth0",
    ] {
        assert!(routes.contains(route), "{route} in {routes}");
    }
    let neighbours = guest.in_network("ip neigh");
    assert!(
        neighbours.contains("169.254.1.1 dev eth0 lladdr 02:00:00:00:00:01 PERMANENT"),
        "{neighbours}"
    );
    assert!(guest.in_network("ip -o link show lo").contains("UP"));

    // A container sees it, whatever its network namespace entry says, and the rest of the sandbox.
    guest.rootfs("c1");
    let mut inside = spec(
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ip addr show eth0 | grep -c 10.88.0.7; hostname; df -k /dev/shm | awk 'NR==2 {print $2}'",
    );
    inside["linux"]["namespaces"][2]["path"] = "/sandbox".into();
    inside["mounts"][3] = serde_json::json!({"destination": "/dev/shm", "type": "bind", "source": "/host/shm", "options": ["rbind"]});
    assert_eq!(
        guest.whole("c1", &inside).await.stdout,
        "7\n1\nweb-0\n1024\n"
    );
    guest.stop().await;
}

#[tokio::test]
async fn an_interface_that_is_not_there_and_a_bad_address_are_named() {
    let guest = Guest::boot().await;
    let (code, text) = refusal(guest.client.start_sandbox(ctx(), &request()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains(MAC), "{text}");
    // Nothing runs in a sandbox that did not start.
    let container = guest
        .client
        .create_container(ctx(), &CreateContainerRequest::default())
        .await;
    refused(container, Code::FAILED_PRECONDITION);
    guest.stop().await;
}

#[tokio::test]
async fn the_log_goes_to_its_stream_as_json_lines() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    guest.whole("c1", &spec("exit 9")).await;
    let mut lines = BufReader::new(guest.open_numbered(LOG_STREAM).await).lines();
    let mut seen = Vec::new();
    loop {
        let line = tokio::time::timeout(PATIENCE, lines.next_line())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert!(line["ts"].is_number() && line["level"].is_string());
        seen.push(line["msg"].as_str().unwrap().to_owned());
        if line["msg"] == "process exited" {
            assert_eq!(
                (line["container"].as_str(), line["status"].as_u64()),
                (Some("c1"), Some(9))
            );
            break;
        }
    }
    assert_eq!(
        seen.first().map(String::as_str),
        Some("sandbox started"),
        "what was logged before comes first"
    );
    guest.stop().await;
}

#[tokio::test]
async fn a_forwarded_port_reaches_a_server_in_a_container() {
    let mut guest = Guest::start().await;
    // It goes into the background once it listens.
    let server = spec("httpd -p 127.0.0.1:8080 -h /etc && echo listens; exec sleep 1000");
    let (stdio, mut ends) = guest.stdio(false, false).await;
    guest.started("c1", &server, stdio).await;
    ends.said("listens\n").await;
    let request = ConnectPortRequest {
        port: 8080,
        stream: 1000,
        ..Default::default()
    };
    guest.client.connect_port(ctx(), &request).await.unwrap();
    let answer = async {
        let mut stream = guest.open_numbered(request.stream).await;
        let _ = stream.write_all(b"GET /passwd HTTP/1.0\r\n\r\n").await;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    };
    let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.") && answer.contains("root:x:0:0"),
        "{answer}"
    );
    guest.stop().await;
}

#[tokio::test]
async fn statistics_and_caches_answer() {
    let mut guest = Guest::start().await;
    let busy = "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done; echo counted; exec sleep 1000";
    let (stdio, mut ends) = guest.stdio(false, false).await;
    guest.started("c1", &spec(busy), stdio).await;
    ends.said("counted\n").await;
    let stats = guest.client.stats(ctx(), &container("c1")).await.unwrap();
    assert!(stats.cpu.usage_usec >= 50_000, "CPU time is counted");
    guest
        .client
        .drop_caches(ctx(), &Empty::new())
        .await
        .unwrap();
    guest.stop().await;
}

#[tokio::test]
async fn a_sysctl_of_the_whole_kernel_is_refused_for_the_sandbox_too() {
    let guest = Guest::boot().await;
    let request = StartSandboxRequest {
        sysctls: [("vm.swappiness".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    let (code, text) = refusal(guest.client.start_sandbox(ctx(), &request).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("vm.swappiness"), "{text}");
    guest.stop().await;
}
