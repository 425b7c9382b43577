// The clusters view: a card for each cluster, with all its images on this page.

const mixedBelow = 1 / 3; // share of the largest class, below which a cluster is not named after it
const shareText = ([name, share]) => `${name} ${percent(share, 0)}`;

// What to call a cluster: its largest class with its share, or "mixed".
function clusterName(number) {
  const [largest] = data.clusters[number].classes;
  if (!largest) return `Cluster ${number + 1}`;
  return largest[1] < mixedBelow ? "mixed" : shareText(largest);
}

// The same with its number, since several clusters may be mixed.
const clusterLabel = (number) =>
  data.clusters[number].classes.length ? `${number + 1} · ${clusterName(number)}` : clusterName(number);

function buildClusters() {
  const members = data.clusters.map((cluster) => [...cluster.members]); // random ones first
  const known = members.map((nodes) => new Set(nodes));
  data.clusterOf.forEach((number, node) => {
    if (number >= 0 && !known[number].has(node)) members[number].push(node);
  });
  const clusterCard = ({ size, classes: shares }, number) => {
    const nodes = members[number];
    const mapped = data.map !== null && nodes.some((node) => data.map.nodes.includes(node));
    const toMap = { href: "#map", class: "button", "data-map-cluster": number };
    const partOf = nodes.length < size ? `, ${integer(nodes.length)} of them on this page` : "";
    return el(
      "article",
      { class: "cluster", "data-area": true },
      el("h3", null, isolate(clusterName(number))),
      el("p", null, span(`Cluster ${number + 1}: ${plural(size, "image")}${partOf}`)),
      shares.length ? el("p", null, span(isolate(shares.map(shareText).join(", ")))) : null,
      shares.length ? bar(shares[0][1]) : null,
      ...pagedTiles({}, nodes, 24, (node) => tile(node, null, "Cluster member", span(isolate(title(node))))),
      el(
        "div",
        { class: "actions" },
        mapped ? el("a", toMap, "Show on the map") : null,
        selectButton(`Select all ${integer(nodes.length)}`, () => nodes),
      ),
    );
  };
  byId("cluster-cards").append(...data.clusters.map(clusterCard));
}
